"""The command ``figures``, end to end on a small study and on runs of no study."""

import json
import shutil

import jax
import numpy as np
import pytest
from command_line import call, one_line
from studies import RECIPE, TINY

from jaxrobust import data
from jaxrobust.app import files, run_folder, trainer
from jaxrobust.app.measurements import accuracy, curvature, noise_counts

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

SMALL = ("--num-draws", "3", "--surface-images", "4", "0", "--surface-resolution", "5",
         "--tsne-images", "30")
PICTURES = ("accuracy_by_curvature", "curvature_by_correct", "loss_surfaces", "blocks_clean",
            "blocks_noisy")
RESULTS = ("curvature", "noise_counts", "surfaces", "blocks")


@pytest.fixture(name="study", scope="module")
def _study(tmp_path_factory, shared_study):
    """A study of two rows; the curvature of one is measured already."""
    folder = shutil.copytree(shared_study, tmp_path_factory.mktemp("study") / "study")
    for name in ("curvature.json", "curvature.npz"):
        (folder / "robust-seed0" / name).unlink()
    assert call("figures", *folder.glob("*-seed0"), *SMALL, "--curvature-images", "20",
                "--curvature-probes", "2") == 0
    return folder


@pytest.mark.slow
def test_the_report_shows_the_figures(study):
    page = (study / "report.html").read_text()
    for anchor in ("robustness", "surfaces", "blocks"):
        assert f'id="{anchor}"' in page
    for name in PICTURES:
        assert (study / "figures" / f"{name}.png").stat().st_size
        assert f"figures/{name}.png" in (study / "report.md").read_text()
    # 20 images: 1.96 / sqrt(19).
    assert "unrelated numbers lie beyond ±0.45 once in 20 times" in page


@pytest.mark.slow
def test_results_are_of_the_images_whose_curvature_is_there(study):
    for row in RECIPE.rows:
        folder = study / f"{row}-seed0"
        curvature, counts = (np.load(folder / f"{name}.npz")
                             for name in ("curvature", "noise_counts"))
        for name in ("index", "label"):
            np.testing.assert_array_equal(curvature[name], counts[name])
        assert counts["gaussian"].shape == counts["uniform"].shape == (3, 20)
        facts = files.read_json(folder / "noise_counts.json")
        # Of the evaluation, where the command line does not say.
        assert facts["test_size"] == 50 and facts["noise_std"] == TINY.noise_std
        assert facts["provenance"]["commit"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "noise"), [
    (0, lambda key, shape: TINY.noise_std * jax.random.normal(key, shape)),
    (1, lambda key, shape: TINY.noise_std * jax.random.uniform(key, shape, minval=-1, maxval=1)),
])
def test_counts_are_of_clipped_noise_that_is_the_images_own(study, number, noise):
    folder, digits = study / "robust-seed0", data.load_dataset("digits")
    run = trainer.load_run(folder, run_folder.read_config(folder), digits)
    split = accuracy.make_test_split(digits, 50)
    there = np.load(folder / "noise_counts.npz")[("gaussian", "uniform")[number]]
    for draw in range(3):
        for image in (0, 7, 19):
            key = jax.random.key(noise_counts.SEED)
            for value in (number, draw, image):
                key = jax.random.fold_in(key, value)
            pixels = split.images[image : image + 1] / np.float32(255)
            noisy = np.clip(pixels + noise(key, pixels.shape), 0, 1)
            logits = run.model.apply(
                trainer.variables_of(run.state), noisy, train=False).logits
            assert there[draw, image] == (np.argmax(logits) == split.labels[image])


def test_the_noise_does_not_repeat_the_probes_of_the_curvature():
    assert noise_counts.SEED != curvature.PROBE_SEED


@pytest.mark.slow
def test_a_surface_has_the_loss_of_the_image_at_its_centre(study):
    surfaces, curvature = (np.load(study / "robust-seed0" / f"{name}.npz")
                           for name in ("surfaces", "curvature"))
    assert surfaces["index"].tolist() == [4, 0] and surfaces["values"].shape == (2, 5, 5)
    np.testing.assert_allclose(surfaces["values"][:, 2, 2], curvature["loss"][[4, 0]], rtol=1e-5)
    np.testing.assert_array_equal(surfaces["label"], curvature["label"][[4, 0]])
    # The length of a typical noise vector of an image of 8 x 8.
    np.testing.assert_allclose(surfaces["offsets"], TINY.noise_std * 8 * np.linspace(-1, 1, 5),
                               rtol=1e-6)


@pytest.mark.slow
def test_every_block_is_embedded(study):
    facts, arrays = (files.read_json(study / "robust-seed0" / "blocks.json"),
                     np.load(study / "robust-seed0" / "blocks.npz"))
    assert arrays["clean"].shape == arrays["noisy"].shape == (len(facts["blocks"]), 30, 2)
    assert np.isfinite(arrays["clean"]).all() and len(facts["channels"]) == len(facts["blocks"])
    assert np.all((arrays["noisy_neighbours"] >= 0) & (arrays["noisy_neighbours"] <= 1))


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(study):
    paths = [study / f"{row}-seed0" / f"{name}.{ending}"
             for row in RECIPE.rows for name in RESULTS for ending in ("json", "npz")]
    before = [path.stat().st_mtime_ns for path in paths]
    page = (study / "report.html").read_bytes()
    assert call("figures", *study.glob("*-seed0"), *SMALL) == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert (study / "report.html").read_bytes() == page


@pytest.mark.slow
@pytest.mark.parametrize(("change", "expected"), [
    (("--num-draws", "4"), "noise_counts.json was made with num_draws=3, not 4"),
    (("--curvature-images", "21"), "curvature.json was made with num_images=20, not 21"),
    (("--test-size", "60"), "curvature.json was made with test_size=50, not 60"),
    (("--surface-images", "1"), "surfaces.json was made with images=[4, 0], not [1]"),
    (("--tsne-images", "31"), "blocks.json was made with num_images=30, not 31"),
    (("--surface-resolution", "4"), "Expected surface_resolution=4 to be odd."),
    (("--num-draws", "0"), "Expected num_draws=0"),
])
def test_other_settings_are_refused_in_one_line(study, change, expected, capsys):
    before = (study / "report.html").stat().st_mtime_ns
    assert call("figures", study / "robust-seed0", *SMALL, *change) == 2
    assert expected in one_line(capsys)
    assert (study / "report.html").stat().st_mtime_ns == before


@pytest.mark.slow
def test_folders_that_hold_no_run_are_refused_before_any_work(study, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "load_run", None)
    assert call("figures", study / "robust-seed0", study / "nowhere") == 2
    assert "error: Expected a run in" in one_line(capsys)
    assert call("figures") == 2
    assert "at least one folder of a run" in one_line(capsys)


@pytest.mark.slow
def test_an_image_that_is_not_there_is_refused(study, tmp_path, capsys):
    shutil.copytree(study / "both-seed0", tmp_path / "run")
    (tmp_path / "run" / "surfaces.json").unlink()
    assert call("figures", tmp_path / "run", *SMALL, "--surface-images", "50") == 2
    assert "surface image=50" in one_line(capsys)


@pytest.mark.slow
def test_runs_of_no_study_have_their_figures_beside_them(study, tmp_path):
    for name in ("both-seed0", "robust-seed0"):
        shutil.copytree(study / name, tmp_path / name)
    assert call("figures", tmp_path / "both-seed0", tmp_path / "robust-seed0", *SMALL) == 0
    text = (tmp_path / "figures" / "figures.md").read_text()
    assert "| both-seed0 |" in text and "| robust-seed0 |" in text
    assert all((tmp_path / "figures" / f"{name}.{ending}").stat().st_size
               for name in PICTURES for ending in ("png", "svg"))
    assert call("figures", tmp_path / "both-seed0", *SMALL, "--out", tmp_path / "out") == 0
    assert "robust-seed0" not in (tmp_path / "out" / "figures.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("pictures_left_out")
def test_seeds_are_averaged_and_runs_that_do_not_fit_are_left_out(study, tmp_path):
    shutil.copytree(study, tmp_path / "study")
    shutil.copytree(study / "robust-seed0", tmp_path / "study" / "robust-seed1")
    for path, change in ((tmp_path / "study" / "study.json", {"seeds": [0, 1]}),
                         (tmp_path / "study" / "both-seed0" / "curvature.json",
                          {"settings": {"num_images": 10, "test_size": 50}})):
        path.write_text(json.dumps(files.read_json(path) | change))
    assert call("report", tmp_path / "study") == 0
    page = (tmp_path / "study" / "report.md").read_text()
    assert f"measured with other images or draws: {RECIPE.labels['both']}, seed 0" in page
    label = RECIPE.labels["robust"]
    with np.load(study / "robust-seed0" / "noise_counts.npz") as counts:
        sizes = 2 * np.bincount(counts["gaussian"].sum(axis=0), minlength=4)
    assert f"| {label}, Gaussian noise | {' | '.join(map(str, sizes))} |" in page
    row = next(line for line in page.splitlines() if line.startswith(f"| {label} |")
               and " to " in line)
    means, spreads = zip(*(cell.split(maxsplit=1) for cell in row.split(" | ")[1:]
                           if " to " in cell), strict=True)
    assert all(f"{mean} to {mean}" in spread for mean, spread in zip(means, spreads, strict=True))


def test_a_run_without_training_noise_is_refused(shared_study, tmp_path, capsys):
    shutil.copytree(shared_study / "both-seed0", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(files.read_json(path) | {"noise_std": 0.0}))
    capsys.readouterr()
    assert call("figures", tmp_path / "run") == 2
    assert "Expected noise_std=0.0 of" in one_line(capsys)
