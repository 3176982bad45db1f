"""What modules import: the layers of the project, and how little a first import takes."""

import subprocess
import sys

import pytest

HEAVY = ("flax", "matplotlib", "optax", "orbax", "PIL", "scipy", "sklearn", "tensorflow", "tyro")


@pytest.mark.parametrize(("statement", "absent"), [
    ("import jaxrobust, jaxrobust.app.cli", ("jax", "numpy", *HEAVY)),
    ("from jaxrobust import *", ("jax.extend", "jax.experimental.pallas", *HEAVY)),
])
def test_an_import_loads_no_more_than_it_needs(statement, absent):
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", program], check=True, text=True,
                                capture_output=True, timeout=120).stdout.split())
    assert "jaxrobust" in loaded and not loaded & set(absent)


def test_names_and_modules_of_the_package_are_found():
    program = ("import jaxrobust; assert jaxrobust.hvp is jaxrobust.curvature.hvp; "
               "assert {*jaxrobust.__all__} <= {*dir(jaxrobust)}; "
               "assert not hasattr(jaxrobust, 'no_such_name'); import jaxrobust.data")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
