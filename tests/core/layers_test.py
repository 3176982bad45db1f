"""What modules import: the layers of the project, no circles, and how little a first import takes.

Imports are read from the sources, those inside functions too.
"""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CORE = ("_activations", "_eager", "_errors", "_hyperparameters", "_random", "_validate", "attacks",
        "centroids", "certification", "corruptions", "curvature", "geometry", "images", "losses",
        "methods", "parallel", "perturbations", "probes", "statistics", "theory")
"""Rooms of the library that need nothing but JAX, NumPy, chex, matfree, SciPy for the statistics,
and each other. Not the metrics, which are scikit-learn's where it has them."""
HEAVY = ("flax", "matplotlib", "optax", "orbax", "PIL", "scipy", "sklearn", "tensorflow", "tyro")


def read_imports() -> dict[str, set[str]]:
    """By module of the project, the modules that it imports."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for package in ("jaxrobust", "experiments") for path in (ROOT / package).rglob("*.py")}
    imports = {}
    for module, path in files.items():
        imports[module] = found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found.update(name if name in files else node.module for name in names)
    return imports


@pytest.fixture(name="imports", scope="module")
def _imports():
    return read_imports()


def is_in(module: str, packages) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def layer_of(module: str) -> int:
    return 2 if is_in(module, ["experiments"]) else 1 if is_in(module, ["jaxrobust.app"]) else 0


def test_the_library_knows_nothing_of_the_application_nor_that_of_the_paper(imports):
    assert {layer_of(module) for module in imports} == {0, 1, 2}
    upward = [(module, other) for module, found in imports.items() for other in found
              if layer_of(other) > layer_of(module) and module != "jaxrobust.__main__"]
    assert not upward


def test_tests_of_the_library_need_nothing_of_the_application_nor_of_the_paper():
    assert not [path.name for path in (ROOT / "tests" / "core").glob("*.py")
                if re.search(r"^ *(import|from) (jaxrobust\.app|experiments)\b",
                             path.read_text(), re.M)]


def test_no_modules_import_each_other(imports):
    inside = {module: found & imports.keys() for module, found in imports.items()}
    list(graphlib.TopologicalSorter(inside).static_order())  # Names the circle if there is one.


@pytest.mark.parametrize("room", CORE)
def test_rooms_of_the_core_import_jax_numpy_chex_matfree_and_each_other(room, imports):
    modules = {module: found for module, found in imports.items()
               if is_in(module, [f"jaxrobust.{room}"])}
    allowed = ("jax", "numpy", "chex", "matfree", *sys.stdlib_module_names,
               *(f"jaxrobust.{room}" for room in CORE),
               *(["scipy"] if room == "statistics" else []))
    assert modules
    assert not [(module, other) for module, found in modules.items() for other in found
                if not is_in(other, allowed)]


def test_the_library_speaks_no_words_of_a_command_line():
    words = re.compile(r"(?<![-\w])--[a-z]|python -m|jaxrobust (train|evaluate|prepare|report)\b")
    found = [(path.name, node.value) for path in (ROOT / "jaxrobust").rglob("*.py")
             if "app" not in path.parts and path.name != "__main__.py"
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)
             and words.search(node.value)]
    assert not found


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
