"""The recipes: comparisons of methods, by name, and the studies that have one at every scale."""

from experiments.config import Recipe
from experiments.recipes import (
    ablations,
    authors_release,
    cifar10,
    cifar10_small,
    digits,
    road,
    svhn,
    svhn_small,
)
from experiments.recipes.scales import SCALES, tiny
from jaxrobust import _validate

STUDIES: dict[str, dict[str, Recipe]] = {
    "cifar10": {"full": cifar10.RECIPE, "small": cifar10_small.RECIPE,
                "tiny": tiny(cifar10.RECIPE)},
    "svhn": {"full": svhn.RECIPE, "small": svhn_small.RECIPE, "tiny": tiny(svhn.RECIPE)},
    "road": {"full": road.ROAD, "small": road.ROAD_SMALL, "tiny": tiny(road.ROAD)},
    **{study: {scale: ablations.at_scale(study, scale) for scale in SCALES}
       for study in ablations.STUDIES},
}
"""By name, the recipe at each scale."""

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (digits.RECIPE, authors_release.CIFAR10, authors_release.SVHN,
                   *(recipe for scales in STUDIES.values() for recipe in scales.values()))
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      InputError: (a ValueError) for an unknown name; it names the nearest.
    """
    _validate.one_of("recipe", name, RECIPES)
    return RECIPES[name]
