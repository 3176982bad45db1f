"""The recipes: comparisons of methods, by name, and the studies that have one at every scale."""

from experiments.recipes import (
    ablations,
    authors_release,
    cifar10,
    cifar10_narrow,
    cifar10_small,
    road,
    svhn,
    svhn_small,
)
from experiments.recipes.scales import SCALES, tiny
from jaxrobust.app.recipe import Recipe, register

STUDIES: dict[str, dict[str, Recipe]] = {
    "cifar10": {"full": cifar10.RECIPE, "small": cifar10_small.RECIPE,
                "tiny": tiny(cifar10.RECIPE)},
    "svhn": {"full": svhn.RECIPE, "small": svhn_small.RECIPE, "tiny": tiny(svhn.RECIPE)},
    "road": {"full": road.ROAD, "small": road.ROAD_SMALL, "tiny": tiny(road.ROAD)},
    **{study: {scale: ablations.at_scale(study, scale) for scale in SCALES}
       for study in ablations.STUDIES},
}
"""By name, the recipe at each scale."""

register(authors_release.CIFAR10, authors_release.SVHN, cifar10_narrow.RECIPE,
         *(recipe for scales in STUDIES.values() for recipe in scales.values()))
