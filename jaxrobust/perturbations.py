r"""Perturbations of images: pure functions ``(key, images) -> images``, pixels in [0, 1].

Each is made by a function of its strength, is registered in :data:`PERTURBATIONS` by that
function's name, and can be written as text: ``gaussian(40/255)+occlusion(20, 70)`` adds Gaussian
noise and then masks patches (:func:`parse_perturbation`).
"""

import ast
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrobust import _validate

Perturbation = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, images [B, H, W, channels]) -> images``. Those made here are pytrees. The strength of
noise is a leaf, so that a jitted function takes them as an argument and is compiled once for all
strengths; sizes and numbers of patches are part of the structure."""


def identity() -> Perturbation:
    """The images as they are."""
    return jax.tree_util.Partial(_identity)


def gaussian(std: float, *, clip: bool = True) -> Perturbation:
    r"""Additive Gaussian noise, :math:`x + \varepsilon`, :math:`\varepsilon \sim N(0, std^2 I)`.

    Args:
      std: standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.
      clip: whether the result is clipped back to [0, 1], as the authors' release does.

    Raises:
      InputError: (a ValueError) if std < 0.
    """
    _validate.in_range("std", std, 0)
    return jax.tree_util.Partial(_clipped_gaussian if clip else _gaussian, std)


def uniform(amplitude: float, *, clip: bool = True) -> Perturbation:
    """Additive noise, uniform in [-amplitude, amplitude], in pixel values of [0, 1].

    Args:
      amplitude: >= 0; 0 gives the image itself.
      clip: whether the result is clipped back to [0, 1], as the authors' release does.

    Raises:
      InputError: (a ValueError) if amplitude < 0.
    """
    _validate.in_range("amplitude", amplitude, 0)
    return jax.tree_util.Partial(_clipped_uniform if clip else _uniform, amplitude)


def laplace(std: float) -> Perturbation:
    r"""Additive Laplace noise, of density :math:`\exp(-\sqrt2 |t| / std) / (\sqrt2\, std)`.

    Named by its standard deviation, as Gaussian noise is, so that equal numbers are equal power.
    The result is clipped to [0, 1].

    Args:
      std: standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.

    Raises:
      InputError: (a ValueError) if std < 0.
    """
    _validate.in_range("std", std, 0)
    return jax.tree_util.Partial(_laplace, std)


def speckle(std: float) -> Perturbation:
    r"""Multiplicative noise, :math:`x (1 + \varepsilon)`, :math:`\varepsilon \sim N(0, std^2)`.

    As the speckle noise of scikit-image and ImageNet-C; the result is clipped to [0, 1].

    Args:
      std: relative standard deviation, >= 0; 0 gives the image itself.

    Raises:
      InputError: (a ValueError) if std < 0.
    """
    _validate.in_range("std", std, 0)
    return jax.tree_util.Partial(_speckle, std)


def salt_and_pepper(amount: float) -> Perturbation:
    """Every value becomes, with probability ``amount``, 0 or 1, which are equally likely.

    The channels of a pixel are struck independently, as in scikit-image and ImageNet-C.

    Args:
      amount: probability in [0, 1]; 0 gives the image itself.

    Raises:
      InputError: (a ValueError) if amount is not in [0, 1].
    """
    _validate.in_range("amount", amount, 0, 1, open_high=False)
    return jax.tree_util.Partial(_salt_and_pepper, amount)


def occlusion(patches: int = 20, size: int = 70) -> Perturbation:
    """Square patches at random places are masked with 0 (black); they may overlap.

    Every patch lies within the image, each place equally likely. The defaults are those of
    Section 7.2. The authors' release leaves images smaller than the patch as they are; here that
    is an error.

    Args:
      patches: of each image, >= 1.
      size: of a patch's side, in pixels, >= 1.

    Raises:
      InputError: (a ValueError) if an argument is out of range; when it is applied, if an image
        is smaller than a patch.
    """
    _validate.integer("patches", patches, 1)
    _validate.integer("size", size, 1)
    return jax.tree_util.Partial(_Masks(patches, size, size))


def stripes(number: int = 10, thickness: int = 6) -> Perturbation:
    """Vertical stripes of the image's height are masked with 0 (black); they may overlap.

    Every stripe lies within the image, each place equally likely. The defaults are those of
    Section 7.2.

    Args:
      number: of stripes in each image, >= 1.
      thickness: in pixels, >= 1.

    Raises:
      InputError: (a ValueError) if an argument is out of range; when it is applied, if an image
        is narrower than a stripe.
    """
    _validate.integer("number", number, 1)
    _validate.integer("thickness", thickness, 1)
    return jax.tree_util.Partial(_Masks(number, None, thickness))


def down_up(factor: int = 3) -> Perturbation:
    """Down-up sampling: a smaller image, and that image at the old size again.

    Both bilinear, with half-pixel centres and without antialiasing, as
    ``torch.nn.functional.interpolate(align_corners=False)``. The small image has
    ``floor(H / factor)`` by ``floor(W / factor)`` pixels. Nothing is random in it.

    Args:
      factor: >= 1; 3 in Section 7.2.

    Raises:
      InputError: (a ValueError) if factor < 1; when it is applied, if an image has fewer pixels
        than ``factor`` on a side.
    """
    _validate.in_range("factor", factor, 1)
    return jax.tree_util.Partial(_DownUp(factor))


def compose(*perturbations: Perturbation) -> Perturbation:
    """One perturbation after the other, the first one first, each with a key of its own.

    Raises:
      InputError: (a ValueError) if there is none.
    """
    if not perturbations:
        raise _validate.InputError("Expected at least one perturbation to compose, got none.")
    if len(perturbations) == 1:
        return perturbations[0]
    return jax.tree_util.Partial(_composed, perturbations)


PERTURBATIONS: dict[str, Callable[..., Perturbation]] = {
    make.__name__: make for make in (
        identity, gaussian, uniform, laplace, speckle, salt_and_pepper, occlusion, down_up, stripes)
}
"""What makes each perturbation, by the name it has in :func:`parse_perturbation`."""


def parse_perturbation(text: str) -> Perturbation:
    """The perturbation that a text names.

    ``NAME(NUMBER, ...)``, with a name of :data:`PERTURBATIONS`; several, joined by ``+``, are
    applied from left to right. A number may be a fraction, such as ``40/255``; arguments may be
    named, and those with a default left out, as ``stripes(10, thickness=6)`` or ``down_up()``.

    Raises:
      InputError: (a ValueError) if the text is not of that form, a name is unknown, or an
        argument does not fit.

    >>> perturb = parse_perturbation("gaussian(40/255)+occlusion(2, 3)")
    >>> images = jnp.ones((1, 8, 8, 3))
    >>> bool(jnp.any(perturb(jax.random.key(0), images) == 0))
    True
    """
    try:
        terms = _terms(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:  # ValueError: a null character
        raise _not_of_the_form(text) from error
    return compose(*(_make(text, term) for term in terms))


def _terms(node):
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _not_of_the_form(text):
    return _validate.InputError(
        f"Expected perturbation={text!r} as NAME(NUMBER, ...)+NAME(...), such as "
        f"gaussian(40/255)+occlusion(20, 70), of: {', '.join(PERTURBATIONS)}.")


def _make(text, node):
    # A name alone is a call without arguments.
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            and all(keyword.arg for keyword in call.keywords)):
        raise _not_of_the_form(text)
    _validate.one_of("perturbation", call.func.id, PERTURBATIONS)
    make = PERTURBATIONS[call.func.id]
    numbers = [_number(text, node) for node in call.args]
    named = {keyword.arg: _number(text, keyword.value) for keyword in call.keywords}
    signature = inspect.signature(make).replace(return_annotation=inspect.Signature.empty)
    try:
        signature.bind(*numbers, **named)
    except TypeError as error:
        raise _validate.InputError(
            f"Expected {make.__name__}{signature} in perturbation={text!r}: {error}.") from error
    try:
        return make(*numbers, **named)
    except _validate.InputError as error:
        raise _validate.InputError(f"{error} It is in perturbation={text!r}.") from error


def _number(text, node):
    """A number, or numbers with arithmetic between them."""
    operations = {ast.Div: operator.truediv, ast.Mult: operator.mul, ast.USub: operator.neg}
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):  # A bool is an int.
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in operations:
        return operations[type(node.op)](_number(text, node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in operations:
        try:
            return operations[type(node.op)](_number(text, node.left), _number(text, node.right))
        except ZeroDivisionError as error:
            raise _not_of_the_form(text) from error
    raise _not_of_the_form(text)


def is_random(perturb: Perturbation) -> bool:
    """Whether the key takes part in a perturbation made here: not in down-up sampling alone."""
    function = perturb.func
    if function is _composed:
        return any(is_random(part) for part in perturb.args[0])
    return not (function is _identity or isinstance(function, _DownUp))


def _identity(key, images):
    del key
    return images


def _gaussian(std, key, images):
    return images + std * jax.random.normal(key, images.shape, images.dtype)


def _uniform(amplitude, key, images):
    return images + amplitude * jax.random.uniform(
        key, images.shape, images.dtype, minval=-1, maxval=1)


def _clipped_gaussian(std, key, images):
    return jnp.clip(_gaussian(std, key, images), 0, 1)


def _clipped_uniform(amplitude, key, images):
    return jnp.clip(_uniform(amplitude, key, images), 0, 1)


def _laplace(std, key, images):
    noise = jax.random.laplace(key, images.shape, images.dtype) * 0.5**0.5
    return jnp.clip(images + std * noise, 0, 1)


def _speckle(std, key, images):
    noise = jax.random.normal(key, images.shape, images.dtype)
    return jnp.clip(images * (1 + std * noise), 0, 1)


def _salt_and_pepper(amount, key, images):
    draws = jax.random.uniform(key, images.shape, images.dtype)
    return jnp.where(draws < amount / 2, 0, jnp.where(draws < amount, 1, images))


@dataclasses.dataclass(frozen=True)
class _Masks:
    """Masks rectangles of one size in every image; compared by value, as jit needs it."""

    number: int
    height: int | None  # None: as high as the image
    width: int

    def __call__(self, key, images):
        batch, rows, columns, _ = images.shape
        height = rows if self.height is None else self.height
        for name, size, side in (("height", height, rows), ("width", self.width, columns)):
            if size > side:
                raise _validate.InputError(
                    f"Expected images of {name} {side} to hold what masks {size} pixels of it.")
        top_key, left_key = jax.random.split(key)

        def covered(key, side, size):
            first = jax.random.randint(key, (batch, self.number, 1), 0, side - size + 1)
            places = jnp.arange(side)[None, None]
            return (first <= places) & (places < first + size)

        vertical, horizontal = covered(top_key, rows, height), covered(
            left_key, columns, self.width)
        masked = jnp.any(vertical[:, :, :, None] & horizontal[:, :, None], axis=1)
        return jnp.where(masked[..., None], 0, images)


@dataclasses.dataclass(frozen=True)
class _DownUp:
    """Samples images down and up again; compared by value, as jit needs it."""

    factor: float

    def __call__(self, key, images):
        del key
        batch, height, width, channels = images.shape
        if min(height, width) < self.factor:
            raise _validate.InputError(
                f"Expected images of {height} x {width} pixels to have at least "
                f"factor={self.factor} on each side.")
        resize = functools.partial(jax.image.resize, method="bilinear", antialias=False)
        small = resize(images, (
            batch, int(height / self.factor), int(width / self.factor), channels))
        # Rounding may leave [0, 1] by a last digit.
        return jnp.clip(resize(small, images.shape), 0, 1)


def _composed(parts, key, images):
    for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
        images = part(own, images)
    return images


def per_example(
    perturb: Perturbation, key: jax.Array, images: jax.Array, indices: jax.Array
) -> jax.Array:
    """Perturbs each image with a key of its own, ``fold_in(key, index)``.

    What happens to an image then depends on ``key`` and its index alone, not on the batch
    it comes in or the device it is on.

    Args:
      perturb: the perturbation.
      key: a PRNG key.
      images: [B, ...] in [0, 1].
      indices: [B] integers that name the images, such as their positions in the data set.

    Raises:
      InputError: (a ValueError) if the shapes do not match.
    """
    _validate.shapes(images=(images, "B ..."), indices=(indices, "B"))

    def one(index, image):
        return perturb(jax.random.fold_in(key, index), image[None])[0]

    return jax.vmap(one)(indices, images)
