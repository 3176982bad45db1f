"""The recipes: comparisons of methods, by name, and studies that have them at several scales."""

from experiments.recipes import (
    ablations,
    authors_release,
    cifar10,
    cifar10_medium,
    cifar10_narrow,
    cifar10_small,
    methods,
    road,
    svhn,
    svhn_small,
)
from experiments.recipes.scales import tiny
from jaxrobust.app.recipe import DIGITS, Recipe, register

STUDIES: dict[str, dict[str, Recipe]] = {
    "cifar10": {"full": cifar10.RECIPE, "medium": cifar10_medium.RECIPE,
                "small": cifar10_small.RECIPE, "tiny": tiny(cifar10.RECIPE)},
    "svhn": {"full": svhn.RECIPE, "small": svhn_small.RECIPE, "tiny": tiny(svhn.RECIPE)},
    "road": {"full": road.ROAD, "small": road.ROAD_SMALL, "tiny": tiny(road.ROAD)},
    **{study: {scale: ablations.at_scale(study, scale) for scale in ablations.AT_SCALES}
       for study in ablations.STUDIES},
    "methods": {scale: methods.at_scale(scale) for scale in methods.SCALES},
    "digits": {"small": DIGITS, "tiny": tiny(DIGITS)},
    "methods_digits": {"small": methods.on_digits()},
}
"""By name, the recipe at each of its scales, the paper's first."""

register(authors_release.CIFAR10, authors_release.SVHN, cifar10_narrow.RECIPE,
         *(recipe for scales in STUDIES.values() for recipe in scales.values()))
