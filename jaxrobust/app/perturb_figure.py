"""Draws an image under several perturbations, like the paper's Fig. 7."""

import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrobust import _validate, data, perturbations
from jaxrobust.app import files
from jaxrobust.app.report import figures
from jaxrobust.images import to_float

EVERY = (
    "identity", "gaussian(40/255)", "uniform(60/255)", "laplace(40/255)", "speckle(0.3)",
    "salt_and_pepper(0.05)", "occlusion(20,70)", "down_up(3)", "stripes(10,6)",
    "gaussian(40/255)+occlusion(20,70)", "down_up(3)+occlusion(20,70)", "down_up(3)+stripes(10,6)")
"""The perturbations of the paper, in its strengths for images of 400 x 500, and the others."""

SUFFIXES = (".png", ".jpg", ".webp", ".svg")
"""Formats of the picture."""


def show_perturbations(
    path: pathlib.Path, image_size: tuple[int, int], texts: Sequence[str], out: pathlib.Path
) -> None:
    """Writes a picture of an image under each perturbation, in the format of ``out``'s suffix."""
    _validate.one_of("suffix of the picture", out.suffix, SUFFIXES)
    files.require_writable_file(out)
    image = to_float(jnp.asarray(data.read_image(path, image_size)))[None]
    views = [perturbations.parse_perturbation(text)(jax.random.key(0), image)[0] for text in texts]
    columns = math.ceil(math.sqrt(len(texts)))
    rows = math.ceil(len(texts) / columns)
    height, width = image_size
    figure = figures.new_figure(2.6 * columns, (2.6 * height / width + 0.3) * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, text, view in zip(axes, texts, views, strict=False):
        ax.imshow(view, interpolation="nearest")
        ax.set_title(text, fontsize=7)
    files.make_folder(out.parent)
    with files.replacing(out) as partial:
        figure.savefig(partial, format=out.suffix[1:], dpi=figures.DPI)
