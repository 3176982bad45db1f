"""The commands curvature and steps: what they write, resuming, and bad input."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from command_line import call, one_line
from studies import RECIPE

from jaxrobust import curvature as measures
from jaxrobust import data
from jaxrobust.app import files, trainer
from jaxrobust.app.config import CurvatureConfig, InputError
from jaxrobust.app.measurements import curvature, steps, theory
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.measurements.theory import checks
from jaxrobust.app.study.read import Run, Study
from jaxrobust.images import to_float

pytestmark = pytest.mark.filterwarnings("default")

TINY = RECIPE.rows["both"]
SETTINGS = CurvatureConfig(num_images=10, num_probes=3, smoothing_draws=3, batch_size=4)
OPTIONS = ("--num-images", "10", "--num-probes", "3", "--smoothing-draws", "3")


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory, shared_study):
    folder = shutil.copytree(shared_study / "both-seed0", tmp_path_factory.mktemp("runs") / "run")
    for path in folder.glob("curvature.*"):
        path.unlink()
    return folder


@pytest.fixture(name="run", scope="module")
def _run(folder):
    return trainer.load_run(folder, TINY, data.load_dataset("digits"))


def measured(run, folder, settings=SETTINGS):
    """The columns that the command writes."""
    folder.mkdir(exist_ok=True)
    measure(curvature.CURVATURE, run, settings, folder, "run")
    with np.load(folder / "curvature.npz") as arrays:
        return dict(arrays)


@pytest.fixture(name="table", scope="module")
def _table(run, tmp_path_factory):
    return measured(run, tmp_path_factory.mktemp("table"))


def images_and_functions(run, count=10):
    split = run.dataset.test
    loss, logits = curvature.losses_of(
        run.model, trainer.variables_of(run.state), jnp.asarray(split.labels[:count]))
    return to_float(jnp.asarray(split.images[:count])), loss, logits


@pytest.mark.parametrize("measured", [
    lambda run, folder: measure(curvature.CURVATURE, run, SETTINGS, folder, "run"),
    lambda run, _: checks.layers_of(run, run.dataset.test)])
def test_logits_that_are_not_finite_are_no_class(measured, run, tmp_path):
    params = run.state.params | {  # Finite, but not the product.
        layer: jax.tree.map(lambda leaf: leaf * 1e25, run.state.params[layer])
        for layer in ("features", "head")}
    with pytest.raises(InputError, match=r"Expected finite logits.*, got \d+ that are NaN or inf"):
        measured(run._replace(state=run.state.replace(params=params)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_columns_are_the_curvatures_of_each_image(run, table):
    images, loss, logits = images_and_functions(run)
    np.testing.assert_allclose(table["loss"], loss(images), rtol=1e-5)
    spectrum = measures.piecewise_linear_spectrum(logits, images)
    for name, expected in (
            ("frobenius_squared", np.sum(np.square(spectrum), axis=1)),
            ("trace", np.sum(spectrum, axis=1)), ("spectral_norm", spectrum[:, -1]),
            ("gauss_newton_eigenvalue_1", spectrum[:, -1]),
            ("gauss_newton_eigenvalue_2", spectrum[:, -2])):
        np.testing.assert_allclose(table[name], expected, rtol=1e-4)
    sampled = measures.squared_frobenius(
        loss, images, jax.random.key(5), num_probes=60, chunk_size=60)
    off = np.abs(table["frobenius_squared"] - sampled.value) / sampled.standard_error
    assert np.all(off < 4.5)
    np.testing.assert_array_equal(table["frobenius_squared_standard_error"], 0)
    assert np.all(table["smoothed_frobenius_squared_standard_error"] > 0)


def test_pandas_opens_the_table(run, tmp_path):
    measured(run, tmp_path)
    frame = pandas.DataFrame(dict(np.load(tmp_path / "curvature.npz")))
    assert len(frame) == 10 and list(frame["index"]) == list(range(10))
    facts = files.read_json(tmp_path / "curvature.json")
    assert facts["piecewise_linear"] is True and facts["gauss_newton_gap"] < 1e-3
    assert facts["settings"]["smoothing"] == TINY.noise_std
    assert facts["with_respect_to"] == "pixels in [0, 1]"


def test_the_batch_size_changes_no_value(run, table, tmp_path):
    other = measured(run, tmp_path, dataclasses.replace(SETTINGS, batch_size=10))
    assert table.keys() == other.keys()
    for name in table:
        # An eigenvalue that is zero is rounding.
        scale = np.abs(table["spectral_norm"]).max() if "eigenvalue" in name else 0
        np.testing.assert_allclose(table[name], other[name], rtol=2e-3, atol=1e-5 * scale)


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


def test_a_killed_measurement_goes_on_where_it_stopped(run, table, tmp_path, monkeypatch):
    as_it_is, calls = curvature._measure_batch, []

    def until_killed(*args, **settings):
        if len(calls) == 2:
            raise Killed
        calls.append(1)
        return as_it_is(*args, **settings)

    monkeypatch.setattr(curvature, "_measure_batch", until_killed)
    with pytest.raises(Killed):
        measured(run, tmp_path)
    assert not (tmp_path / "curvature.json").exists()
    with pytest.raises(InputError, match="was begun with num_probes=3, not 4"):
        measured(run, tmp_path, dataclasses.replace(SETTINGS, num_probes=4))
    calls.clear()
    again = measured(run, tmp_path)
    assert len(calls) == 1, "Two of three batches were there."
    for name in table:
        np.testing.assert_array_equal(table[name], again[name])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "curvature.json", "curvature.npz"]


def test_normalised_inputs_scale_the_curvature_and_the_step(run, table, tmp_path):
    std, = run.model.std
    other = measured(run, tmp_path, dataclasses.replace(
        SETTINGS, inputs="normalised", step=SETTINGS.step / std))
    for name, power in (("frobenius_squared", 4), ("trace", 2), ("finite_difference", 4),
                        ("smoothed_trace", 2), ("gradient_squared", 2)):
        np.testing.assert_allclose(other[name], std**power * table[name], rtol=1e-3)
    assert files.read_json(tmp_path / "curvature.json")["with_respect_to"] == "normalised images"


@pytest.mark.slow
def test_a_smooth_network_is_told_apart_and_measured_by_products(run, tmp_path):
    smooth = run._replace(model=run.model.clone(activation=jax.nn.gelu))
    table = measured(smooth, tmp_path, dataclasses.replace(SETTINGS, num_probes=16, num_images=4))
    facts = files.read_json(tmp_path / "curvature.json")
    assert facts["piecewise_linear"] is False and facts["gauss_newton_gap"] > 0.01
    images, loss, _ = images_and_functions(smooth, 4)
    for b in range(4):
        hessian = jax.jit(jax.hessian(lambda pixels, b=b: loss(
            images.at[b].set(pixels.reshape(images.shape[1:])))[b]))(images[b].ravel())
        eigenvalues = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
        for name, exact in (("frobenius_squared", np.sum(eigenvalues**2)),
                            ("trace", np.sum(eigenvalues)),
                            ("spectral_norm", np.abs(eigenvalues).max())):
            error = table[f"{name}_standard_error"][b]
            assert np.abs(table[name][b] - exact) < 5 * error + 1e-3 * np.abs(exact), name


def test_what_needs_the_exact_spectrum_refuses_a_smooth_network(run, tmp_path):
    smooth = run._replace(model=run.model.clone(activation=jax.nn.gelu))
    with pytest.raises(InputError, match="affine pieces for steps, .* got model='small_cnn'"):
        measure(steps.STEPS, smooth, steps.StepSettings(num_images=4), tmp_path, "smooth")
    with pytest.raises(InputError, match="affine pieces for theory, "):
        measure(
            theory.THEORY, smooth, theory.TheorySettings(num_images=4), tmp_path, "smooth")
    assert not list(tmp_path.iterdir())


def test_the_command_measures_and_refuses_other_settings(folder, capsys):
    assert call("curvature", folder, *OPTIONS) == 0
    before = (folder / "curvature.npz").stat().st_mtime_ns
    assert call("curvature", folder, *OPTIONS, "--batch-size", "5") == 0
    assert (folder / "curvature.npz").stat().st_mtime_ns == before
    capsys.readouterr()
    for arguments, expected in (
            (("--num-probes", "4"), "was made with num_probes=3, not 4"),
            (("--inputs", "pixel"), "Unknown inputs 'pixel'. Did you mean 'pixels'?"),
            (("--step", "0"), "Expected step=0.0 in (0, inf)."),
            (("--num-images", "0"), "Expected num_images=0")):
        assert call("curvature", folder, *OPTIONS, *arguments) == 2
        assert expected in one_line(capsys)


@pytest.mark.slow
def test_the_step_is_studied_in_both_precisions(run, folder, tmp_path):
    settings = steps.StepSettings(steps=(1e-5, 1e-2, 1e-1), num_images=3, num_probes=3)
    measure(steps.STEPS, run, settings, folder, "run")
    with np.load(folder / "steps.npz") as arrays:
        table = dict(arrays)
    assert all(len(column) == 2 * 3 * 3 for column in table.values())
    images, loss, logits = images_and_functions(run, 3)
    expected = measures.finite_difference_curvature(
        loss, images, jax.random.key(curvature.PROBE_SEED), step=1e-2, num_probes=3)
    for bits in (32, 64):
        at = (table["bits"] == bits) & (table["step"] == 1e-2)
        np.testing.assert_allclose(
            table["exact"][at],
            np.sum(np.square(measures.piecewise_linear_spectrum(logits, images)), axis=1),
            rtol=1e-3)
    at = (table["bits"] == 32) & (table["step"] == 1e-2)
    np.testing.assert_allclose(table["finite_difference"][at], expected.value, rtol=1e-3)
    curve = steps.step_curves("run", table)
    np.testing.assert_array_equal(curve.steps, settings.steps)
    assert curve.exact == np.median(table["exact"][table["bits"] == 64])
    study = Study("s", "s", "", "", "", {"normal": "Normal"}, {"normal": "normal"}, (0,), None, {},
                  None, {}, {}, {"normal": (Run(folder, 0, None, {}, (), None),)})
    section = steps.STEPS.section(study)
    assert len(section.tables[0].rows) == 1 and section.pictures[0].name == "steps"
    assert steps.STEPS.section(dataclasses.replace(study, runs={"normal": ()})) is None
    with pytest.raises(InputError, match="was made with num_probes=3, not 4"):
        measure(steps.STEPS, run, dataclasses.replace(settings, num_probes=4), folder, "run")
