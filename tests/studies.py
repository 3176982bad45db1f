"""A finished study of two rows, which the tests of several commands share.

It is trained once in a session, whatever the number of workers. Who changes it copies it.
"""

import dataclasses
import fcntl
import pathlib

from jaxrobust.app import config
from jaxrobust.app.recipe import RECIPES
from jaxrobust.app.study.plan import plan_study
from jaxrobust.app.study.run import run_study

ROWS = ("both", "robust")
TINY = dataclasses.replace(
    RECIPES["digits"].rows["robust"], train_size=150, epochs=2, checkpoint_every=1, width=2,
    num_features=4, batch_norm_statistics="recomputed", optimizer=config.OptimizerConfig(
        learning_rate=0.02, schedule="cosine", clip_norm=1.0))
RECIPE = dataclasses.replace(
    RECIPES["digits"], name="tiny", seeds=(0,),
    rows={row: dataclasses.replace(TINY, method=row) for row in ROWS},
    labels={row: RECIPES["digits"].labels[row] for row in ROWS},
    evaluation=config.Evaluation(noise_levels=(0, 32), num_draws=3, test_size=50,
                                 tsne_images=40),
    curvature=config.CurvatureConfig(num_images=20, num_probes=2, smoothing_draws=3))


def make(folder: pathlib.Path, digits) -> None:
    """Trains, tests and measures the study in ``folder``, unless another worker has."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            failures = run_study(plan_study(RECIPE, folder), digits)
            assert failures == []
            done.touch()
