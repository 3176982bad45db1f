"""Measures what an update costs that stops at what is not finite, against one that does not.

    python results/reliability/guard.py

The step is that of ``robust``, on images of 32 x 32, compiled as the trainer does. Both are called
in turns; the cost is the median over pairs of calls, with its 95 % interval from a bootstrap. CPU
seconds, of all threads, depend less on what else the machine does than seconds do.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxrobust import methods, models, parallel, training  # noqa: E402
from jaxrobust.app import files, provenance  # noqa: E402

CASES = (("small_cnn", 16, 64, 600), ("small_cnn", 64, 64, 120), ("resnet18", 16, 32, 120))
"""Model, width, batch size and number of pairs."""
WARM_UP = 5


def make_call(when, model, batch_size):
    """Makes ``() -> metrics``, an update of its own state."""
    optimizer = training.sgd(1e-4, clip_norm=1.0)
    step = training.make_train_step(
        model, methods.make_method("robust"), optimizer, when_not_finite=when)
    layout = parallel.make_layout("jit")
    images = jax.random.uniform(jax.random.key(0), (batch_size, 32, 32, 3))
    batch = parallel.replicate(layout, methods.Batch(
        images, jnp.clip(images + 0.1, 0, 1), jnp.arange(batch_size) % 10))
    state = parallel.replicate(layout, training.create_train_state(
        model, optimizer, jax.random.key(1), images[:1]))
    compiled = parallel.compile_step(layout, lambda _: lambda state, batch, _: step(state, batch))

    def call():
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, batch, ()))
        return metrics

    return call


def measure(name: str, width: int, batch_size: int, pairs: int) -> dict:
    """The costs in one case."""
    model = models.create_model(name, num_classes=10, num_features=128, width=width,
                                mean=(0.5,) * 3, std=(0.25,) * 3)
    calls = {when: make_call(when, model, batch_size) for when in (None, "stop")}
    spent = {when: [] for when in calls}
    for pair in range(-WARM_UP, pairs):
        for when in (None, "stop") if pair % 2 else ("stop", None):
            before = time.process_time(), time.perf_counter()
            metrics = calls[when]()
            after = time.process_time(), time.perf_counter()
            if pair >= 0:
                spent[when].append(np.subtract(after, before))
            if not metrics[training.FINITE]:
                raise SystemExit(f"{name}: an update was not finite, which costs something else.")
    plain, guarded = (np.array(spent[when]) for when in (None, "stop"))
    ratios = guarded / plain  # [pairs, 2]
    random = np.random.default_rng(0)
    drawn = [np.median(ratios[random.integers(0, pairs, pairs)], axis=0) for _ in range(2000)]
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return {"model": name, "width": width, "batch": batch_size, "pairs": pairs, **{
        clock: {"milliseconds": 1e3 * float(np.median(plain[:, at])),
                "cost": float(np.median(ratios[:, at]) - 1),
                "low": float(low[at] - 1), "high": float(high[at] - 1)}
        for at, clock in enumerate(("cpu_seconds", "seconds"))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "load" / "guard.json")
    parser.add_argument("--share", type=float, default=1.0, help="of the pairs, to try it out")
    asked = parser.parse_args()
    cases = []
    for *case, pairs in CASES:
        cases.append(measure(*case, max(2, round(asked.share * pairs))))
        print(json.dumps(cases[-1]), flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(asked.out, {"cases": cases, "provenance": provenance.describe()})


if __name__ == "__main__":
    main()
