"""How the networks of a study are tested by the suite: corruptions, attacks and certificates.

    python -m experiments reproduce corruptions --scale small --jobs 2
    python -m experiments reproduce survival --scale small --jobs 2
    python -m experiments reproduce methods --scale small --jobs 2

Corruptions are measured on the test images of the study's evaluation; attacks and certificates,
which take much longer, on the first 500 of these, whose curvature a study measures too.
Certificates draw noise of the standard deviation that the networks were trained with. No network
withstands the usual 8/255 that was not trained with attacks: hence 2/255 beside it. The many
runs of `methods` get less at the small scale: one severity of each corruption, on 1,000 images, and
attacks on 100 images in one ball, on digits on 200 in two.
"""

import dataclasses
from typing import Any

from experiments.recipes.scales import name_at
from jaxrobust.app.measurements.attacks import AttackSettings
from jaxrobust.app.measurements.certificates import CertificateSettings
from jaxrobust.app.measurements.corruptions import CorruptionSettings
from jaxrobust.app.recipe import Recipe

ATTACKS_ON_MANY = {
    name_at("methods", "small"): AttackSettings(linf=(2 / 255,), l2=(), limit=100),
    "methods_digits": AttackSettings(linf=(2 / 255,), l2=(0.5,), limit=200)}
"""By name of a recipe of many runs."""


def settings_of(recipe: Recipe, scale: str) -> dict[str, Any]:
    """Returns the settings of a study's recipe at a scale, by kind of measurement."""
    noise_std = next(iter(recipe.rows.values())).noise_std
    every: dict[str, Any] = {
        "corruptions": CorruptionSettings(),
        "attacks": AttackSettings(
            linf=(2 / 255, 8 / 255), l2=(0.5,), nearest=("l2",), limit=500),
        "certificates": CertificateSettings(
            sigma=noise_std, n=100_000 if scale == "full" else 10_000, limit=500)}
    if recipe.name in ATTACKS_ON_MANY:
        return every | {"corruptions": CorruptionSettings(severities=(3,), limit=1000),
                        "attacks": ATTACKS_ON_MANY[recipe.name]}
    if scale != "tiny":
        return every
    smaller: dict[str, dict[str, Any]] = {
        "corruptions": {"names": ("gaussian_noise", "fog"), "severities": (1, 5)},
        "attacks": {"num_steps": 2, "num_targets": 1, "num_queries": 3, "linf": (8 / 255,),
                    "limit": 40},
        "certificates": {"n0": 5, "n": 50, "limit": 40}}
    return {kind: dataclasses.replace(every[kind], **fewer) for kind, fewer in smaller.items()}
