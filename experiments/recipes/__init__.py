"""The recipes: one small module each, with the constant ``RECIPE``."""

from experiments.config import Recipe
from experiments.recipes import cifar10, cifar10_small, digits, svhn
from jaxrobust import _validate

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (digits, cifar10, svhn, cifar10_small)
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      InputError: (a ValueError) for an unknown name; it names the nearest.
    """
    _validate.one_of("recipe", name, RECIPES)
    return RECIPES[name]
