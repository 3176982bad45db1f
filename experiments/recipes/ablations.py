"""The paper's ablation (Table 5), and the questions that it leaves open.

    python -m experiments reproduce table5 --scale small
    python -m experiments reproduce centroids --scale small

Each row changes one thing of the paper's method and keeps all else; :data:`QUESTIONS` says which
rows answer what. At full scale the rest is the recipe `cifar10` (for Table 5 `svhn` too). The small
scale is half of `cifar10_small`: 5,120 training images, 12 epochs, and the small weights of the
paper's loss that work in its short schedule (see `cifar10_small`): alpha = 1 at full scale is 0.01
there, beta = 1 is 0.05 and lambda = 1 is 0.05.
"""

import dataclasses
from typing import Any, NamedTuple

from experiments.paper import TABLES
from experiments.recipes import cifar10, cifar10_small, svhn
from experiments.recipes.scales import name_at, tiny
from jaxrobust.app.config import (
    CurvatureConfig,
    Evaluation,
    OptimizerConfig,
    RunConfig,
    with_settings,
)
from jaxrobust.app.recipe import METHOD_LABELS, Cost, Recipe
from jaxrobust.losses import RobustLossConfig

Rows = dict[str, tuple[str, RunConfig]]
"""By row, its label and its configuration."""


def _base(run: RunConfig, evaluation: Evaluation, cost: Cost, **settings) -> Recipe:
    return Recipe("ablations", "", {"robust": run}, {}, evaluation, cost=cost, seeds=(0, 1, 2),
                  may_diverge=True, **settings)


FULL = _base(cifar10.RECIPE.rows["robust"], cifar10.RECIPE.evaluation, Cost(
    cpu_hours=60.0, cpu_gigabytes=6.0, gpu_hours=0.15, basis="projected"))
"""What all rows have in common at full scale: the paper's method, and the cost of one run."""

SMALL = _base(
    dataclasses.replace(cifar10_small.BASE, train_size=5120, epochs=12),
    Evaluation(noise_levels=(0, 4, 8, 16, 20), num_draws=3, test_size=2000, tsne_images=200,
               perturb=cifar10.NOISES),
    Cost(cpu_hours=0.04, cpu_gigabytes=4.0, gpu_hours=0.01, basis=cifar10_small.RECIPE.cost.basis),
    curvature=CurvatureConfig(num_images=200, num_probes=4, smoothing_draws=16),
    note="5,120 training images, a ResNet18 of width 8 and 960 steps instead of 156,000, with the "
         "weights of the paper's loss that work in so short a schedule (alpha 0.01, beta 0.05, "
         "lambda 0.05 where the paper has 1): compare the rows with each other, not with the "
         "paper's.")
"""The same at the small scale."""

RATES = (0.005, 0.05, 0.2)
"""Learning rates of the rows that train without clipping; 0.05 is that of the small recipes."""

DISTANCES = (0.5, 1.0, 2.0, 5.0)
"""delta_d of the rows with delta_v = 0.5: a half, one, two and five times the ball's diameter."""


class Question(NamedTuple):
    """A question, and the rows that answer it."""

    title: str
    rows: tuple[str, ...]
    reference: str = "robust"  # the row that the others are compared with


QUESTIONS: dict[str, Question] = {
    "centroids": Question("How centroids are tracked", ("robust", "naive", "momentum", "slow")),
    "noise": Question(
        "Level and family of the training noise",
        ("robust", "half", "double", "uniform", "laplace", "speckle", "salt_and_pepper")),
    "passes": Question(
        "One or two forward passes for the two views",
        ("both", "robust", "robust_one", "stability", "stability_one"), "both"),
    "alignment": Question("The weight of the alignment", ("robust", "lam_0", "lam_4", "lam_20")),
    "margin": Question(
        "The margin against the diameter of the balls",
        tuple(f"distance_{index}" for index in range(len(DISTANCES))),
        f"distance_{len(DISTANCES) - 1}"),
    "features": Question(
        "Where the feature layer sits",
        ("both", "both_relu", "both_pooled", "robust", "robust_relu", "robust_pooled")),
    "rates": Question("Learning rates without clipping", tuple(
        f"{method}_rate_{index}" for method in ("normal", "both", "paper")
        for index in range(len(RATES))), "both_rate_1"),
    "stabilisers": Question(
        "What lets the paper's weights train at a high rate",
        ("both_rate_1", "paper_rate_1", "paper_clip", "paper_warm", "paper_linear",
         "paper_linear_clip", "paper_linear_warm_clip", "small_weights"), "both_rate_1"),
}


def _changed(run: RunConfig, **settings) -> RunConfig:
    """Changes settings of a run; __ stands for the dot in a name."""
    return with_settings(run, {name.replace("__", "."): value for name, value in settings.items()})


def ablation_rows(run: RunConfig) -> Rows:
    """Makes the rows of all questions from a run of the paper's method."""
    by_method = {method: dataclasses.replace(run, method=method) for method in METHOD_LABELS}
    return {
        **{method: (METHOD_LABELS[method], by_method[method])
           for method in ("normal", "both", "stability", "robust")},
        "robust_one": ("Robust, one pass", _changed(run, one_pass=True)),
        "stability_one": ("Stability, one pass",
                          _changed(by_method["stability"], one_pass=True)),
        **_centroid_rows(run), **_noise_rows(run), **_weight_rows(run),
        **_feature_rows(by_method), **_rate_rows(run)}


def _centroid_rows(run: RunConfig) -> Rows:
    naive = {f"robust__{name}_centroids": "naive" for name in ("compact", "margin", "norm")}
    return {
        "naive": ("Centroids of the batch alone", _changed(run, **naive)),
        "momentum": ("Momentum for the margin too",
                     _changed(run, robust__margin_centroids="momentum")),
        "slow": ("Momentum of 0.99", _changed(run, robust__momentum=0.99)),
    }


def _noise_rows(run: RunConfig) -> Rows:
    std = run.noise_std
    # The power of the Gaussian noise, for speckle on values with a mean square of 1/4.
    families = {"uniform": f"uniform({std * 3 ** 0.5:.3g})", "laplace": f"laplace({std:g})",
                "speckle": f"speckle({2 * std:g})",
                "salt_and_pepper": f"salt_and_pepper({4 * std**2:.2g})"}
    return {
        "half": (f"gaussian({std / 2:g})", _changed(run, noise_std=std / 2)),
        "double": (f"gaussian({2 * std:g})", _changed(run, noise_std=2 * std)),
        **{name: (text, _changed(run, perturb=text)) for name, text in families.items()},
    }


def _weight_rows(run: RunConfig) -> Rows:
    lam = run.robust.lam
    ball = _changed(run, robust__delta_v=0.5)
    return {
        **{f"lam_{factor}": (f"λ = {factor * lam:g}", _changed(run, robust__lam=factor * lam))
           for factor in (0, 4, 20)},
        **{f"distance_{index}": (f"δ_v = 0.5, δ_d = {distance:g}",
                                 _changed(ball, robust__delta_d=distance))
           for index, distance in enumerate(DISTANCES)},
    }


def _feature_rows(by_method: dict[str, RunConfig]) -> Rows:
    rows = {}
    for method in ("both", "robust"):
        run = by_method[method]
        rows[f"{method}_relu"] = (
            f"{METHOD_LABELS[method]}, ReLU on the features",
            _changed(run, feature_layer="dense_relu"))
        rows[f"{method}_pooled"] = (
            f"{METHOD_LABELS[method]}, no feature layer",
            _changed(run, feature_layer="pooled", num_features=8 * run.width))
    return rows


def _rate_rows(run: RunConfig) -> Rows:
    # A short schedule at any scale: the paper's own rate is too low to ask.
    run = dataclasses.replace(
        run, epochs=min(run.epochs, 30), robust=RobustLossConfig(), optimizer=OptimizerConfig(
            learning_rate=RATES[1], schedule="cosine", warmup_epochs=1.0, clip_norm=None))
    paper = run
    labels = {"normal": "Normal", "both": "Both", "paper": "Robust, the paper's weights"}
    runs = {"normal": _changed(run, method="normal"), "both": _changed(run, method="both"),
            "paper": paper}
    clip, linear = {"optimizer__clip_norm": 1.0}, {"robust__compact_linear_beyond": 1.0}
    warm = {"constraint_warmup_epochs": run.epochs / 2}
    return {
        **{f"{name}_rate_{index}": (
            f"{label}, rate {rate:g}", _changed(runs[name], optimizer__learning_rate=rate))
           for name, label in labels.items() for index, rate in enumerate(RATES)},
        "paper_clip": ("… clipped to norm 1", _changed(paper, **clip)),
        "paper_warm": ("… warmed up over half of the epochs", _changed(paper, **warm)),
        "paper_linear": ("… hinge linear beyond 1", _changed(paper, **linear)),
        "paper_linear_clip": ("… linear and clipped", _changed(paper, **linear, **clip)),
        "paper_linear_warm_clip": ("… linear, warmed up and clipped",
                                   _changed(paper, **linear, **warm, **clip)),
        "small_weights": ("Weights of 0.01 and 0.05, δ_v = 0",
                          _changed(paper, robust=cifar10_small.BASE.robust)),
    }


def table5_rows(run: RunConfig) -> Rows:
    """Varies the constraints one by one, and the weight of the norm, on clean images alone."""
    run = dataclasses.replace(run, method="robust_clean")
    return {
        "compact": ("Compactness alone (β = 0)", _changed(run, robust__beta=0.0)),
        "margin": ("Margin alone (α = 0)", _changed(run, robust__alpha=0.0)),
        "alpha_beta": ("Both, γ_reg = 0.001", run),
        "gamma_0": ("Both, γ_reg = 0", _changed(run, robust__gamma_reg=0.0)),
        "gamma_1": ("Both, γ_reg = 1", _changed(run, robust__gamma_reg=1.0)),
        "softmax": ("Softmax loss alone", dataclasses.replace(run, method="normal")),
    }


TABLE5 = {"table5_cifar10": cifar10.RECIPE, "table5_svhn": svhn.RECIPE}
"""By study, the recipe whose data set and noise it has."""

STUDIES = ("ablations", *TABLE5)

AT_SCALES = ("full", "small", "tiny")


def at_scale(study: str, scale: str) -> Recipe:
    """Makes the recipe of one of :data:`STUDIES` at one of :data:`AT_SCALES`."""
    base = SMALL if scale == "small" else FULL
    run, evaluation = base.rows["robust"], base.evaluation
    paper: dict[str, Any] = {}
    if study == "ablations":
        title, rows = "Changes to the method, one at a time", ablation_rows(run)
    else:
        title = f"The constraints one by one: {TABLES[study].title}"
        peer = TABLE5[study].rows["robust"]
        rows = table5_rows(dataclasses.replace(
            run, dataset=peer.dataset, noise_std=peer.noise_std))
        evaluation = dataclasses.replace(evaluation, noise_levels=(0,), perturb=())
        paper = {"paper_table": study, "paper_rows": {row: row for row in TABLES[study].rows}}
    cost = dataclasses.replace(base.cost, cpu_hours=base.cost.cpu_hours * len(rows),
                               gpu_hours=base.cost.gpu_hours * len(rows))
    recipe = dataclasses.replace(
        base, name=name_at(study, "small" if base is SMALL else "full"), title=title,
        rows={row: run for row, (_, run) in rows.items()},
        labels={row: label for row, (label, _) in rows.items()}, evaluation=evaluation, cost=cost,
        **paper)
    return tiny(recipe) if scale == "tiny" else recipe
