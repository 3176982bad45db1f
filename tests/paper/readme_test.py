"""The README: short, its links lead somewhere, its code runs and its commands exist."""

import pathlib
import re

import jax
import numpy as np
import pytest

from experiments.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md",
         *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9 * 1024


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), target


def test_the_commands_of_the_pages_exist():
    for page in PAGES:
        for command in re.findall(
                r"^ {4}(?:jaxrobust|python -m experiments) ([a-z]+)", page.read_text(),
                re.MULTILINE):
            assert command in COMMANDS, (page, command)


def test_the_losses_are_trained_as_the_readme_shows():
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    rng = np.random.default_rng(0)
    clean = np.float32(rng.random((32, 784)))
    noisy, labels = np.float32(clean + 0.1 * rng.standard_normal(clean.shape)), np.arange(32) % 10
    centroids, losses = names["centroids"], []
    for _ in range(3):
        loss, centroids = names["step"](
            names["model"], names["optimizer"], centroids, clean, noisy, np.int32(labels))
        losses.append(float(loss))
    assert losses[-1] < losses[0] and bool(centroids.seen.all())
    assert centroids.mean.shape == (10, 128) and jax.numpy.isfinite(centroids.mean).all()
