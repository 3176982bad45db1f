"""The recipes: comparisons of methods, by name."""

from experiments.config import Recipe
from experiments.recipes import authors_release, cifar10, cifar10_small, digits, road, svhn
from jaxrobust import _validate

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (digits.RECIPE, cifar10.RECIPE, svhn.RECIPE, cifar10_small.RECIPE,
                   authors_release.CIFAR10, authors_release.SVHN,
                   road.ROAD, road.ROAD_SMALL)
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      InputError: (a ValueError) for an unknown name; it names the nearest.
    """
    _validate.one_of("recipe", name, RECIPES)
    return RECIPES[name]
