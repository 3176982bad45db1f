r"""Perturbations of images: pure functions ``(key, images) -> images``, pixels in [0, 1].

Images are of any floating dtype, which the result keeps. Noise is drawn and applied in float32: in
bfloat16, whose uniform draws are multiples of 2^-7, a probability of 0.004 would be 0 or 0.0078.

Each is made by a function of its strength, is registered in :data:`PERTURBATIONS` by that
function's name, and can be written as text: ``gaussian(40/255)+occlusion(20, 70)`` adds Gaussian
noise and then masks patches (:func:`parse_perturbation`), and the corruptions of
:mod:`jaxrobust.corruptions` by their severity, ``fog(3)``. These functions raise InputError (a
ValueError) if an argument is out of its range, and so do the perturbations if images are not of a
floating dtype or too small.
"""

import ast
import dataclasses
import functools
import inspect
import numbers
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import _validate
from jaxrobust._random import draw_flat
from jaxrobust.corruptions import CORRUPTIONS, MAKERS, Corruption

Perturbation = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, images [B, H, W, channels]) -> images``. Those made here are pytrees. The strength of
noise is a leaf, so that a jitted function takes them as an argument and is compiled once for all
strengths; sizes and numbers of patches are part of the structure."""

_LARGEST = float(np.finfo(np.float32).max)
_MOST_MASKS = 10_000
_SHOWN = 80  # Characters of a text that a message repeats.


def identity() -> Perturbation:
    """Leaves the images as they are."""
    return jax.tree_util.Partial(_identity)


def gaussian(std: float, *, clip: bool = True) -> Perturbation:
    r"""Adds Gaussian noise, :math:`x + \varepsilon`, :math:`\varepsilon \sim N(0, std^2 I)`.

    Args:
      std: standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.
      clip: whether the result is clipped back to [0, 1], as the authors' release does.
    """
    return jax.tree_util.Partial(_Noise(_normal_draw, clip=clip), _strength("std", std))


def sometimes_gaussian(std: float, probability: float = 0.5) -> Perturbation:
    """Adds Gaussian noise to each image with the given probability, and leaves the others clean.

    Training on such images is Gaussian data augmentation on a part of each batch (Rusak et al.
    2020, "A simple way to make neural networks robust against diverse image corruptions",
    https://arxiv.org/abs/2001.06057, on half). The result is clipped to [0, 1].

    Args:
      std: standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.
      probability: that an image gets noise, in [0, 1]; it is drawn for each image.
    """
    _validate.in_range("probability", probability, 0, 1, open_high=False)
    return jax.tree_util.Partial(_Noise(_Mixed(float(probability))), _strength("std", std))


def random_gaussian(std: float) -> Perturbation:
    """Adds Gaussian noise whose standard deviation is drawn for each image from U(0, std).

    For an unknown noise level; the result is clipped to [0, 1].

    Args:
      std: largest standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.
    """
    return jax.tree_util.Partial(_Noise(_random_level_draw), _strength("std", std))


def uniform(amplitude: float, *, clip: bool = True) -> Perturbation:
    """Adds noise, uniform in [-amplitude, amplitude], in pixel values of [0, 1].

    Args:
      amplitude: >= 0; 0 gives the image itself.
      clip: whether the result is clipped back to [0, 1], as the authors' release does.
    """
    return jax.tree_util.Partial(
        _Noise(_uniform_draw, clip=clip), _strength("amplitude", amplitude))


def laplace(std: float) -> Perturbation:
    r"""Adds Laplace noise, of density :math:`\exp(-\sqrt2 |t| / std) / (\sqrt2\, std)`.

    It is given by its standard deviation, as Gaussian noise is, so that equal numbers mean equal
    power. The result is clipped to [0, 1].

    Args:
      std: standard deviation in pixel values of [0, 1], >= 0; 0 gives the image itself.
    """
    return jax.tree_util.Partial(_Noise(_laplace_draw), _strength("std", std))


def speckle(std: float) -> Perturbation:
    r"""Scales pixels at random, :math:`x (1 + \varepsilon)`, :math:`\varepsilon \sim N(0, std^2)`.

    This is the speckle noise of scikit-image and ImageNet-C; the result is clipped to [0, 1].

    Args:
      std: relative standard deviation, >= 0; 0 gives the image itself.
    """
    return jax.tree_util.Partial(
        _Noise(_normal_draw, relative=True), _strength("std", std))


def salt_and_pepper(amount: float) -> Perturbation:
    """Replaces every value, with probability ``amount``, by 0 or 1, which are equally likely.

    The channels of a pixel are replaced independently, as in scikit-image and ImageNet-C.

    Args:
      amount: probability in [0, 1]; 0 gives the image itself.
    """
    _validate.in_range("amount", amount, 0, 1, open_high=False)
    return jax.tree_util.Partial(_salt_and_pepper, _strength("amount", amount))


def occlusion(patches: int = 20, size: int = 70) -> Perturbation:
    """Masks square patches at random places with 0 (black); they may overlap.

    Every patch lies within the image, each place equally likely. The defaults are those of
    Section 7.2. The authors' release leaves images smaller than a patch as they are; here they are
    an error.

    Args:
      patches: number of patches in each image, in [1, 10000].
      size: side of a patch, in pixels, >= 1.
    """
    patches, size = _validate.integer("patches", patches, 1), _validate.integer("size", size, 1)
    _validate.in_range("patches", patches, 1, _MOST_MASKS, open_high=False)
    return jax.tree_util.Partial(_Masks(patches, size, size))


def stripes(number: int = 10, thickness: int = 6) -> Perturbation:
    """Masks vertical stripes of the image's height with 0 (black); they may overlap.

    Every stripe lies within the image, each place equally likely. The defaults are those of
    Section 7.2.

    Args:
      number: of stripes in each image, in [1, 10000].
      thickness: in pixels, in [1, W].
    """
    number = _validate.integer("number", number, 1)
    _validate.in_range("number", number, 1, _MOST_MASKS, open_high=False)
    thickness = _validate.integer("thickness", thickness, 1)
    return jax.tree_util.Partial(_Masks(number, None, thickness))


def down_up(factor: int = 3) -> Perturbation:
    """Samples images down to ``floor(H / factor)`` by ``floor(W / factor)`` pixels, and up again.

    Both are bilinear, with half-pixel centres and without antialiasing, as
    ``torch.nn.functional.interpolate(align_corners=False)``. The key is not used.

    Args:
      factor: in [1, min(H, W)]; 3 in Section 7.2.
    """
    factor = _validate.integer_in("factor", factor, 1)
    return jax.tree_util.Partial(_DownUp(factor))


def _strength(name: str, value: float) -> float:
    """Checks a strength >= 0 that float32 holds; makes numbers floats, of one type for jit."""
    _validate.in_range(name, value, 0)
    _validate.in_range(name, value, 0, _LARGEST, open_high=False)
    return float(value) if isinstance(value, numbers.Real) else value


def compose(*perturbations: Perturbation) -> Perturbation:
    """Applies at least one perturbation, from left to right, each with a key of its own."""
    if not perturbations:
        raise _validate.InputError("Expected at least one perturbation to compose, got none.")
    if len(perturbations) == 1:
        return perturbations[0]
    return jax.tree_util.Partial(_composed, perturbations)


PERTURBATIONS: dict[str, Callable[..., Perturbation]] = {
    make.__name__: make for make in (
        identity, gaussian, sometimes_gaussian, random_gaussian, uniform, laplace, speckle,
        salt_and_pepper, occlusion, down_up, stripes)
} | MAKERS
"""The functions that make perturbations, by their names in :func:`parse_perturbation`."""


def parse_perturbation(text: str) -> Perturbation:
    """Makes the perturbation that a text names.

    The text is ``NAME(NUMBER, ...)``, with a name of :data:`PERTURBATIONS`, or several joined by
    ``+``, which are applied from left to right. A number may be a fraction, such as ``40/255``;
    arguments may be named, and those with a default omitted, as in ``stripes(10, thickness=6)`` or
    ``down_up()``.

    Raises:
      InputError: (a ValueError) if the text is not of that form, a name is unknown, an argument
        does not fit, or the strength of noise is above 1, which was probably meant in units of
        1/255.

    >>> perturb = parse_perturbation("gaussian(40/255)+occlusion(2, 3)")
    >>> images = jnp.ones((1, 8, 8, 3))
    >>> bool(jnp.any(perturb(jax.random.key(0), images) == 0))
    True
    """
    _validate.instance("text", text, str)
    try:
        calls = [_read_call(node) for node in _terms(ast.parse(text.strip(), mode="eval").body)]
    # ValueError: a null character. MemoryError: the parser's stack.
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise _validate.InputError(
            f"Expected perturbation={_shown(text)} as NAME(NUMBER, ...)+NAME(...), such as "
            "gaussian(40/255)+occlusion(20, 70), of: "
            f"{', '.join(name for name in PERTURBATIONS if name not in CORRUPTIONS)}, or a "
            "corruption with its severity, such as fog(3).") from error
    return compose(*(_make(text, *call) for call in calls))


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _terms(node: ast.expr) -> list[ast.expr]:
    """The nodes of a sum, in their order."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _read_call(node: ast.expr) -> tuple[str, list[float], list[tuple[str, float]]]:
    """The name, the numbers and the named numbers of a call; SyntaxError for anything else."""
    # A bare name is a call without arguments.
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            and all(keyword.arg for keyword in call.keywords)):
        raise SyntaxError("not a call")
    named = [(keyword.arg, _number(keyword.value)) for keyword in call.keywords if keyword.arg]
    return call.func.id, [_number(node) for node in call.args], named


def _number(node: ast.expr) -> float:
    """The value of a number or of an arithmetic expression of numbers."""
    operations: dict[type[ast.AST], Callable[..., float]] = {
        ast.Div: operator.truediv, ast.Mult: operator.mul, ast.USub: operator.neg}
    # A bool is an int.
    if (isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
            and not isinstance(node.value, bool)):
        number: float = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in operations:
        number = operations[type(node.op)](_number(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in operations:
        number = operations[type(node.op)](_number(node.left), _number(node.right))
    else:
        raise SyntaxError("not a number")
    float(number)  # OverflowError for an integer of some hundred digits.
    return number


def _make(
    text: str, name: str, values: list[float], named: list[tuple[str, float]]
) -> Perturbation:
    _validate.one_of("perturbation", name, PERTURBATIONS)
    make = PERTURBATIONS[name]
    signature = inspect.signature(make).replace(return_annotation=inspect.Signature.empty)
    try:
        names = [argument for argument, _ in named]
        for argument in names:
            if names.count(argument) > 1:  # The parser accepts this.
                raise TypeError(f"{argument} is given {names.count(argument)} times")
        arguments = signature.bind(*values, **dict(named)).arguments
    except TypeError as error:
        raise _validate.InputError(f"Expected {make.__name__}{signature} in "
                                   f"perturbation={_shown(text)}: {error}.") from error
    try:
        made = make(*values, **dict(named))
        for strength in {"std", "amplitude"} & arguments.keys():
            if arguments[strength] > 1:
                raise _validate.InputError(
                    f"Expected {strength}={arguments[strength]} in [0, 1], in pixel values of "
                    f"[0, 1]. Did you mean {arguments[strength]}/255?")
        return made
    except _validate.InputError as error:
        raise _validate.InputError(f"{error} It is in perturbation={_shown(text)}.") from error


def is_random(perturb: Perturbation) -> bool:
    """Whether a perturbation depends on the key, unlike down-up sampling or a blur.

    One that was not made here counts as random.
    """
    if not isinstance(perturb, jax.tree_util.Partial):
        return True
    function = perturb.func
    if function is _composed:
        return any(is_random(part) for part in perturb.args[0])
    if isinstance(function, Corruption):
        return function.is_random
    return not (function is _identity or isinstance(function, _DownUp))


def _check_images(images: jax.Array, spec: str) -> dict[str, int]:
    """Checks images; returns their sizes by the names in ``spec``."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise _validate.InputError(
            f"Expected images of a floating dtype, pixels in [0, 1], got {images.dtype}.")
    return _validate.shapes(images=(images, spec))


def _widened(images: jax.Array) -> jax.Array:
    """Images in float32, or in their own dtype if that is wider."""
    return images.astype(jnp.float64 if images.dtype == jnp.float64 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Noise:
    """Adds noise to images, or scales them by 1 + noise; compared by value, as jit needs it."""

    draw: Callable[..., jax.Array]  # (key, shape of the images) -> noise of strength 1
    relative: bool = False
    clip: bool = True

    def __call__(self, strength: float | jax.Array, key: jax.Array, images: jax.Array) -> jax.Array:
        _check_images(images, "B ...")
        wide = _widened(images)
        noise = jnp.asarray(strength, jnp.float32) * self.draw(key, images.shape)
        noise = noise.astype(wide.dtype)
        noisy = wide * (1 + noise) if self.relative else wide + noise
        return (jnp.clip(noisy, 0, 1) if self.clip else noisy).astype(images.dtype)


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """Normal noise for a part of the images, drawn at random, and 0 for the others."""

    probability: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        chosen_key, key = jax.random.split(key)
        chosen = jax.random.bernoulli(chosen_key, self.probability, _one_per_image(shape))
        return chosen.astype(jnp.float32) * _normal_draw(key, shape)


def _random_level_draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    level_key, key = jax.random.split(key)
    level = jax.random.uniform(level_key, _one_per_image(shape), jnp.float32)
    return level * _normal_draw(key, shape)


def _one_per_image(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], *(1 for _ in shape[1:])


def _normal_draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return draw_flat(jax.random.normal, key, shape)


def _uniform_draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return draw_flat(jax.random.uniform, key, shape, minval=-1, maxval=1)


def _laplace_draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return draw_flat(jax.random.laplace, key, shape) * 0.5**0.5


def _identity(key: jax.Array, images: jax.Array) -> jax.Array:
    del key
    _check_images(images, "B ...")
    return images


def _salt_and_pepper(amount: float | jax.Array, key: jax.Array, images: jax.Array) -> jax.Array:
    _check_images(images, "B ...")
    draws = draw_flat(jax.random.uniform, key, images.shape)
    amount = jnp.asarray(amount, jnp.float32)
    return jnp.where(draws < amount / 2, 0, jnp.where(draws < amount, 1, images))


@dataclasses.dataclass(frozen=True)
class _Masks:
    """Masks rectangles of one size in every image; compared by value, as jit needs it."""

    number: int
    height: int | None  # None: as high as the image
    width: int

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        size = _check_images(images, "B H W channels")
        batch, rows, columns = size["B"], size["H"], size["W"]
        height = rows if self.height is None else self.height
        for name, size, side in (("height", height, rows), ("width", self.width, columns)):
            if size > side:
                raise _validate.InputError(
                    f"Expected images of {name} >= {size}, that of a mask, got {side}.")
        top_key, left_key = jax.random.split(key)

        def covered(key: jax.Array, side: int, size: int) -> jax.Array:
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

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        del key
        batch, height, width, channels = _check_images(images, "B H W channels").values()
        if min(height, width) < self.factor:
            raise _validate.InputError(
                f"Expected images of {height} x {width} pixels to have at least "
                f"factor={self.factor} on each side.")
        resize = functools.partial(jax.image.resize, method="bilinear", antialias=False)
        small = resize(_widened(images), (
            batch, int(height / self.factor), int(width / self.factor), channels))
        # Rounding may leave [0, 1] by the last digit.
        return jnp.clip(resize(small, images.shape), 0, 1).astype(images.dtype)


def _composed(parts: Sequence[Perturbation], key: jax.Array, images: jax.Array) -> jax.Array:
    for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
        images = part(own, images)
    return images


def per_example(
    perturb: Perturbation, key: jax.Array, images: jax.Array, indices: jax.Array
) -> jax.Array:
    """Perturbs each image with a key of its own, ``fold_in(key, index)``.

    The result for an image then depends on ``key`` and its index only, not on the batch it comes in
    or the device it is on.

    Args:
      perturb: the perturbation.
      key: a PRNG key.
      images: [B, ...] in [0, 1].
      indices: [B] integers that name the images, such as their positions in the data set.
    """
    _validate.function("perturb", perturb)
    _validate.key("key", key)
    indices = _validate.class_numbers("indices", indices)
    _validate.shapes(images=(images, "B ..."), indices=(indices, "B"))

    def one(index: jax.Array, image: jax.Array) -> jax.Array:
        return perturb(jax.random.fold_in(key, index), image[None])[0]

    return jax.vmap(one)(indices, images)
