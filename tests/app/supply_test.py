"""What the project is built from and needs: pinned build steps, licences."""

import importlib.metadata
import importlib.util
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(name="licences", scope="module")
def _licences():
    spec = importlib.util.spec_from_file_location("licences", ROOT / ".ci" / "licences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_licences_of_all_that_is_installed_are_allowed(licences):
    _, refused = licences.table_of(importlib.metadata.distributions())
    assert not refused


@pytest.mark.parametrize("expression", ["", "GPL-3.0-only", "MIT AND GPL-3.0-only",
                                        "MIT AND (Apache-2.0 OR GPL-3.0-only)", "UNKNOWN"])
def test_a_licence_that_is_not_allowed_is_refused(licences, expression):
    assert not licences.is_allowed(expression)


@pytest.mark.parametrize("expression", ["MIT", "GPL-3.0-only OR MIT",
                                        "(MIT OR BSD-2-Clause) AND ISC"])
def test_a_licence_that_may_be_chosen_is_allowed(licences, expression):
    assert licences.is_allowed(expression)


def test_a_package_whose_licence_is_refused_is_named(licences, tmp_path):
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: closed\nVersion: 1.0\n"
                                       "License: Proprietary\n")
    package = importlib.metadata.PathDistribution(tmp_path)
    assert licences.table_of([package])[1] == [
        "closed 1.0: Proprietary is not among those allowed"]


def test_what_builds_the_package_is_pinned():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build["requires"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", step) for step in build["requires"])
