"""What beats training on both views: the field's methods beside the paper's, at equal compute.

    python -m experiments reproduce methods --scale small --jobs 2

Every row trains as in `ablations`: at the small scale 5,120 images, width 8, 12 epochs. On digits
it trains as in `digits`, with more noise and the same settings for all else. Rows with
the suffix `_work` repeat a method for as many epochs as make its work that of `both`, which passes
two views: :func:`at_work_of`. The work of an update is `Method.passes.relative`, and twice that for
sharpness-aware ones. Methods with the work of `both` need no such row.

Settings are those of the sources where they have them, and otherwise the library's defaults; none
was tuned here, but for the paper's loss:

- noise on a half of the images: standard deviation 0.1 in Rusak et al. 2020 (in the words of Kireev
  et al. 2021), and the 0.06 of the other rows;
- noise of a random level: U(0, 0.12), twice the level of the other rows, as for `consistency` in
  its source (DiGN), which has the same form;
- `center`: weight 0.003, rate 0.5; `noisy_consistency`: weight 10, entropy 0.5, two draws;
  `jacobian_penalty`: weight 0.01, one projection;
- `pgd` and `trades`: small radii with three steps, since noise and corruptions are what is tested:
  2/255 in L-inf, where both sources have 8/255, and the 0.1 in L2 with which Kireev et al. train
  for corruptions of CIFAR-10; TRADES with weight 6;
- `augmix`: severity 3, three chains of up to three operations, weight 12;
- `cure`: the exact Hessian with weight 1, for which its source's finite difference over 1.5 has no
  counterpart; `gradient_penalty`: weight 0.1; `large_margin`: weight 1, margin 1;
- label smoothing of 0.1, the average of the parameters with decay 0.99, and a sharpness-aware
  radius of 0.05, each around `both`. The average needs recomputed batch statistics.

At the small scale the paper's loss has the small weights that work in short schedules (see
`cifar10_small`). Its variations are on top of `robust_both` and change its options alone:
`direction` and `relative` have a margin delta_d of 0.5, a sine in the first, and the first has ten
times the small weights (at most the paper's 1), since distances of directions are at most 2;
`linear_warm` has a linear hinge beyond 1 and weights that grow over a quarter of the epochs, ten
times as large for compactness and alignment.
"""

import dataclasses

from experiments.recipes import ablations
from experiments.recipes.scales import name_at, tiny
from jaxrobust.app.config import RunConfig, with_epochs, with_settings
from jaxrobust.app.program import work_of
from jaxrobust.app.recipe import DIGITS, METHOD_LABELS, Cost, Recipe

REFERENCE = "both"
"""The row that the others are compared with."""

SCALES = ("full", "small", "tiny")

def at_work_of(reference: RunConfig, run: RunConfig) -> RunConfig:
    """Gives a run as many epochs, at least one, as make its work that of a reference, rounded; the
    whole schedule with them."""
    return with_epochs(
        run, max(1, round(reference.epochs * work_of(reference) / work_of(run))))


def method_rows(run: RunConfig) -> dict[str, tuple[str, RunConfig]]:
    """Makes all rows, by key the label and the run, from a run of the paper's method."""
    def of(method: str, **settings) -> RunConfig:
        """Changes settings of a method's run, one after the other, each of which must fit those
        before; __ stands for the dot in a name."""
        return with_settings(dataclasses.replace(run, method=method), {
            name.replace("__", "."): value for name, value in settings.items()})

    def attacked(method: str, norm: str, epsilon: float) -> RunConfig:
        attack = {"norm": norm, "epsilon": epsilon, "num_steps": 3}
        return with_settings(of(method), {
            f"options.{method}.{name}": value for name, value in attack.items()})

    std = run.noise_std
    alpha, beta, lam = (min(10 * weight, 1.0) for weight in (
        run.robust.alpha, run.robust.beta, run.robust.lam))
    rows = {
        **{method: (label, of(method)) for method, label in METHOD_LABELS.items()},
        "half_low": (f"Noise of {std:g} on a half", of(
            "noisy", perturb=f"sometimes_gaussian({std:g}, 1/2)")),
        "half": ("Noise of 0.1 on a half", of("noisy", perturb="sometimes_gaussian(0.1, 1/2)")),
        "random": (f"Noise of U(0, {2 * std:g})", of(
            "noisy", perturb=f"random_gaussian({2 * std:g})")),
        "robust_both": ("Both + robust", of("robust_both")),
        "direction": ("Both + robust, directions", of(
            "robust_both", robust__delta_v=0.0, robust__delta_d=0.5, robust__direction=True,
            robust__alpha=alpha, robust__beta=beta, robust__lam=lam)),
        "other": ("Both + robust, the other view's centroid", of(
            "robust_both", robust__align_to="other")),
        "relative": ("Both + robust, relative margin", of(
            "robust_both", robust__margin_relative=True, robust__delta_d=0.5)),
        "linear_warm": ("Both + robust, linear and warmed up", of(
            "robust_both", robust__compact_linear_beyond=1.0, robust__alpha=alpha,
            robust__lam=lam, constraint_warmup_epochs=run.epochs / 4)),
        "center": ("Centre loss", of("center")),
        "consistency": ("Consistency (DiGN)", of(
            "consistency", perturb=f"random_gaussian({2 * std:g})")),
        "noisy_consistency": ("Consistency of noisy views", of("noisy_consistency")),
        "gradient_penalty": ("Gradient penalty", of("gradient_penalty")),
        "jacobian_penalty": ("Jacobian penalty", of("jacobian_penalty")),
        "cure": ("Curvature penalty (CURE)", of("cure")),
        "large_margin": ("Large margin at the input", of("large_margin")),
        "pgd": ("PGD, 2/255", attacked("pgd", "linf", 2 / 255)),
        "pgd_l2": ("PGD, 0.1 in L2", attacked("pgd", "l2", 0.1)),
        "trades": ("TRADES, 2/255", attacked("trades", "linf", 2 / 255)),
        "trades_l2": ("TRADES, 0.1 in L2", attacked("trades", "l2", 0.1)),
        "augmix": ("AugMix", of("augmix")),
        "smoothed": ("Both, labels smoothed", of("both", label_smoothing=0.1)),
        "averaged": ("Both, parameters averaged", of(
            "both", batch_norm_statistics="recomputed", optimizer__ema_decay=0.99)),
        "sam": ("Both, sharpness-aware", of("both", optimizer__sam_radius=0.05)),
    }
    reference = rows[REFERENCE][1]
    return rows | {
        f"{row}_work": (f"{label}; work of both", at_work_of(reference, of_row))
        for row, (label, of_row) in rows.items() if work_of(of_row) != work_of(reference)}


def at_scale(scale: str) -> Recipe:
    """Makes the recipe at one of :data:`SCALES`."""
    base = ablations.SMALL if scale == "small" else ablations.FULL
    # The hours of a run there are those of its paper's method, as many passes as `both`.
    recipe = _compared(base, base.cost, name_at("methods", "small" if scale == "small" else "full"),
                       "What beats training on both views?")
    return tiny(recipe) if scale == "tiny" else recipe


def on_digits() -> Recipe:
    """Makes the recipe of the digits, which is small as it is."""
    a_run = dataclasses.replace(DIGITS.cost, cpu_hours=DIGITS.cost.cpu_hours / len(DIGITS.rows),
                                gpu_hours=DIGITS.cost.gpu_hours / len(DIGITS.rows))
    return _compared(DIGITS, a_run, "methods_digits", DIGITS.title)


def _compared(base: Recipe, a_run: Cost, name: str, title: str) -> Recipe:
    """The rows with the settings of a recipe's row of the paper's method; ``a_run`` is the cost of
    a run of `both`."""
    rows = method_rows(base.rows["robust"])
    reference = rows[REFERENCE][1]
    runs = sum(work_of(run) * run.epochs for _, run in rows.values()) / (
        work_of(reference) * reference.epochs)
    return dataclasses.replace(
        base, name=name, title=title, rows={row: run for row, (_, run) in rows.items()},
        labels={row: label for row, (label, _) in rows.items()}, curvature=None,
        cost=dataclasses.replace(a_run, cpu_hours=a_run.cpu_hours * runs,
                                 gpu_hours=a_run.gpu_hours * runs))
