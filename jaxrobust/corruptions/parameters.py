"""Parameters of the corruptions: those of both generators, and what lies between them.

The tables are facts of the generators of CIFAR-10-C (32 x 32 pixels) and ImageNet-C (224 x 224),
https://github.com/hendrycks/robustness.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from jaxrobust import _validate

SEVERITIES = (1, 2, 3, 4, 5)

_SMALL, _LARGE = 32, 224  # Sides of the images of CIFAR-10 and ImageNet, in pixels.


def _linear(share: float, small: float, large: float) -> float:
    return (1 - share) * small + share * large


class _Share(NamedTuple):
    """Where the size of an image lies between CIFAR's, 0, and ImageNet's, 1."""

    side: float  # Linear in the side.
    log_side: float  # Linear in its logarithm.


def _number(share: _Share, small: float, large: float) -> float:
    return _linear(share.log_side, small, large)


def _whole(share: _Share, small: float, large: float) -> int:
    return round(_number(share, small, large))


def _length(share: _Share, small: float, large: float) -> float:
    """A length in pixels, which grows with the image."""
    return _linear(share.side, small, large)


def _whole_length(share: _Share, small: float, large: float) -> int:
    return round(_length(share, small, large))


def _ratio(share: _Share, small: float, large: float) -> float:
    return math.exp(_linear(share.log_side, math.log(small), math.log(large)))


_Kind = Callable[[_Share, float, float], float]


class _Table(NamedTuple):
    kinds: tuple[_Kind, ...]  # How each column is interpolated.
    cifar: tuple[tuple[float, ...], ...]  # A row for each severity.
    imagenet: tuple[tuple[float, ...], ...]


def _column(kind: _Kind, cifar: str, imagenet: str) -> _Table:
    """The table of a corruption with one parameter, whose five values are given as text."""
    return _Table((kind,), *(tuple((float(value),) for value in text.split())
                             for text in (cifar, imagenet)))


_TABLES = {
    # Standard deviation.
    "gaussian_noise": _column(_number, ".04 .06 .08 .09 .10", ".08 .12 .18 .26 .38"),
    # Photons of a white pixel.
    "shot_noise": _column(_ratio, "500 250 100 75 50", "60 25 12 5 3"),
    # Share of the values that are struck.
    "impulse_noise": _column(_number, ".01 .02 .03 .05 .07", ".03 .06 .09 .17 .27"),
    # Radius of the disk, standard deviation of what smooths its edge.
    "defocus_blur": _Table(
        (_length, _length),
        ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
        ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5))),
    # Standard deviation, largest shift, iterations.
    "glass_blur": _Table(
        (_length, _whole_length, _whole),
        ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),
        ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    # Radius, standard deviation.
    "motion_blur": _Table(
        (_length, _length),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    # Where the zooms from 1 on end, and their step.
    "zoom_blur": _Table(
        (_number, _number),
        ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),
        ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03))),
    # Mean and standard deviation of the flakes' noise, their zoom and threshold, radius and
    # standard deviation of their motion, weight of the image beside a whitened one.
    "snow": _Table(
        (_number, _number, _number, _number, _length, _length, _number),
        ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
         (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),
        ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
         (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55))),
    # Weights of the image and of the frost.
    "frost": _Table(
        (_number, _number),
        ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),
        ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75))),
    # Amount of fog, decay of its fractal from scale to scale.
    "fog": _Table(
        (_number, _number),
        ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    # What is added to V of HSV.
    "brightness": _column(_number, ".05 .1 .15 .2 .3", ".1 .2 .3 .4 .5"),
    # Factor about the mean of the channel.
    "contrast": _column(_number, ".75 .5 .4 .3 .15", ".4 .3 .2 .1 .05"),
    # Largest displacement before smoothing, standard deviation of that, and largest shift of the
    # affine map's points, relative to the side; ImageNet-C multiplies its own with 244 pixels.
    "elastic_transform": _Table(
        (_number, _number, _number),
        ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)),
        tuple(tuple(value * 244 / 224 for value in row) for row in (
            (2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02)))),
    # Factor by which the sides shrink.
    "pixelate": _column(_number, ".95 .9 .85 .75 .65", ".6 .5 .4 .3 .25"),
    # Quality.
    "jpeg_compression": _column(_whole, "80 65 58 50 40", "25 18 15 10 7"),
    # Relative standard deviation.
    "speckle_noise": _column(_number, ".06 .1 .12 .16 .2", ".15 .2 .35 .45 .6"),
    # Standard deviation.
    "gaussian_blur": _column(_length, ".4 .6 .7 .8 1", "1 2 3 4 6"),
    # Mean and standard deviation of the liquid's noise, standard deviation of what smooths it,
    # threshold, opacity of water or standard deviation of what smooths mud, whether it is mud.
    "spatter": _Table(
        (_number, _number, _length, _number, _number, _whole),
        ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
         (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)),
        ((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
         (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1))),
    # Factor of S of HSV, and what is added to it.
    "saturate": _Table(
        (_number, _number),
        ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)),
        ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2))),
}


def parameters_for(name: str, severity: int, height: int, width: int) -> tuple[float | int, ...]:
    """Returns the parameters of a corruption for images of a size.

    Those of CIFAR-10-C if the shorter side has 32 pixels or fewer, those of ImageNet-C if it has
    224 or more. Between them, lengths in pixels are linear in the shorter side, other parameters
    in its logarithm, and the photons of ``shot_noise`` are so too in theirs; whole numbers are
    rounded. At 64 pixels that comes close to what the authors chose for Tiny ImageNet-C.

    Args:
      name: of the corruption.
      severity: 1 to 5.
      height: of the images, in pixels.
      width: likewise.

    >>> parameters_for("gaussian_noise", 2, 32, 32), parameters_for("jpeg_compression", 5, 400, 500)
    ((0.06,), (7,))
    """
    _validate.one_of("corruption", name, _TABLES)
    severity = _validate.integer("severity", severity, 1)
    _validate.in_range("severity", severity, 1, 5, open_high=False)
    height, width = (
        _validate.integer("height", height, 1), _validate.integer("width", width, 1))
    side = min(max(min(height, width), _SMALL), _LARGE)
    share = _Share((side - _SMALL) / (_LARGE - _SMALL),
                   math.log(side / _SMALL) / math.log(_LARGE / _SMALL))
    table = _TABLES[name]
    return tuple(kind(share, small, large) for kind, small, large in zip(
        table.kinds, table.cifar[severity - 1], table.imagenet[severity - 1], strict=True))
