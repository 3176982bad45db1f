"""The wheel in an environment of its own, outside the repository: what a user installs."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import numpy as np
import PIL.Image
import pytest
from sklearn import datasets

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    """Runs a program of an environment that holds the wheel and what it asks for alone."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir",
                    folder, ROOT], check=True)
    wheel, = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", f"{wheel}[app]"],
                   check=True, env=environment)

    def run(program, *words):
        done = subprocess.run([programs / program, *map(str, words)], cwd=folder, text=True,
                              capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_the_sdist_builds_offline_and_gives_the_wheel_of_the_tree(tmp_path):
    tree, unpacked = tmp_path / "tree", tmp_path / "unpacked"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "results", "runs"))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needed], check=True)
    subprocess.run([python, "-c", "from setuptools import build_meta\n"
                    "build_meta.build_sdist('../sdist')"], cwd=tree, check=True, text=True,
                   capture_output=True)
    archive, = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(unpacked, filter="data")

    contents = []
    for source in (tree, *unpacked.iterdir()):
        wheels = tmp_path / f"wheel of {source.name}"
        subprocess.run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index",
                        "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
        wheel, = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            contents.append({name: packed.read(name) for name in packed.namelist()})
    of_tree, of_sdist = contents
    assert of_sdist == of_tree
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jaxrobust").rglob("*")
            if path.is_file() and path.suffix != ".pyc"}
    assert {name for name in of_tree if name.startswith("jaxrobust/")} == ours
    assert "jaxrobust/py.typed" in ours


def test_the_commands_of_the_wheel_work_outside_the_repository(run):
    commands = run("jaxrobust", "--help")
    for command in ("demo", "train", "compare", "evaluate", "predict", "export", "report"):
        assert f"  {command} " in commands
    assert run("jaxrobust", "--version").startswith("jaxrobust ")
    run("jaxrobust", "demo", "--seeds", "0", "--jobs", "2")
    page = (run.folder / "runs" / "digits" / "report.html").read_text()
    assert "Training on both clean and noisy images" in page and "jaxrobust 0" in page
    run("jaxrobust", "train", "digits/both", "--epochs", "6", "--out", "both")
    run("jaxrobust", "evaluate", "both", "--noise-levels", "0", "32", "--num-draws", "2")
    digits = datasets.load_digits()
    pixels = np.uint8(digits.images[0] * (255 / 16))
    PIL.Image.fromarray(pixels).save(run.folder / "digit.png")
    said = run("jaxrobust", "predict", "both", "digit.png")
    assert "digit.png" in said
    run("jaxrobust", "export", "both", "--out", "both.stablehlo")
    assert (run.folder / "both.stablehlo").stat().st_size
    run("jaxrobust", "report", "both")
    assert (run.folder / "report" / "report.html").is_file()


def test_the_library_needs_none_of_what_the_commands_do(run):
    said = run("python", "-c", "import sys, jaxrobust.losses; "
               "print(sorted({'tyro', 'matplotlib', 'pandas', 'flax'} & set(sys.modules)))")
    assert said.strip() == "[]"
