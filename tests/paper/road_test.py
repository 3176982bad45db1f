"""The road recipe: a folder of photographs, weights from PyTorch, every row of Tables 3 and 4."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import PIL.Image
import pytest
from command_line import call, one_line

from experiments.paper import TABLE4, TABLES
from jaxrobust import checkpoints, data, models, perturbations
from jaxrobust.app import datasets, doubt, files, network, predict, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import accuracy
from jaxrobust.app.recipe import RECIPES
from jaxrobust.app.report import report
from jaxrobust.app.run_folder import read_config
from jaxrobust.app.study.plan import place_of
from jaxrobust.models import pytorch

pytestmark = pytest.mark.filterwarnings("default")  # Orbax warns about itself.

SIZES = ("--image-size", "16", "20", "--model", "resnet18", "--width", "2", "--num-features", "8",
         "--batch-size", "8", "--epochs", "2", "--optimizer.warmup-epochs", "0", "--no-tensorboard")
PERTURB = ("gaussian(40/255)+occlusion(20,3)", "down_up(3)", "laplace(0.1)")


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    """Photographs of three classes, told apart by their colour: JPEG, of mixed sizes."""
    folder, draw = tmp_path_factory.mktemp("road"), np.random.default_rng(0)
    for number, label in enumerate(("dry", "snow", "wet")):
        (folder / label).mkdir()
        for index in range(15):
            pixels = draw.uniform(0, 120, size=(18 + index, 26, 3))
            pixels[..., number] += 120
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{index}.jpg")
    return folder


@pytest.fixture(name="data_dir", scope="module")
def _data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(name="run", scope="module")
def _run(folder, data_dir, tmp_path_factory):
    """A run that started from a file of PyTorch weights with other classes."""
    place = tmp_path_factory.mktemp("runs")
    weights, out = place / "weights.safetensors", place / "run"
    model = models.create_model(
        "resnet18", num_classes=10, num_features=8, width=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(7), np.zeros((1, 16, 20, 3), np.float32))
    pytorch.write_state_dict(weights, pytorch.to_torch_state_dict(model, variables))
    assert call("train", "road_small/robust", "--data-dir", data_dir, "--data",
                f"folder:{folder}", *SIZES, "--init-from", weights, "--perturb",
                "gaussian(40/255)+occlusion(2,4)", "--out", out) == 0
    assert call("evaluate", out, "--noise-levels", "0", "40", "--num-draws", "2",
                "--tsne-images", "9", "--perturb", *PERTURB, "--data-dir", data_dir) == 0
    return out


def load(run, data_dir):
    config = read_config(run)
    return trainer.load_run(run, config, datasets.open_dataset(config, data_dir))


@pytest.mark.slow
def test_the_split_is_saved_and_a_changed_folder_is_refused(run, folder, data_dir, capsys):
    files = data.files_from_csv((run / "split.csv").read_text())
    assert len(files) == 45 and sum(file.split == "test" for file in files) == 9
    extra = folder / "wet" / "new.jpg"
    PIL.Image.new("RGB", (20, 20)).save(extra)
    datasets._load_folder.cache_clear()
    try:
        capsys.readouterr()
        assert call("evaluate", run, "--data-dir", data_dir) == 2
        assert "1 new, 0 gone" in one_line(capsys)
    finally:
        extra.unlink()
        datasets._load_folder.cache_clear()


@pytest.mark.slow
def test_a_run_starts_from_the_weights_and_says_what_starts_anew(run, data_dir):
    facts = files.read_json(run / "provenance.json")["init_from"]
    assert facts["initialised_anew"] == ["head"] and len(facts["sha256"]) == 64
    rows = files.read_lines(run / "metrics.jsonl")
    assert len(rows) == 2 and all(np.isfinite(row["align"]) for row in rows)
    # All layers are trained, and some steps later are still near to where they started.
    given = pytorch.read_state_dict(read_config(run).init_from)
    trained = load(run, data_dir)
    now = pytorch.to_torch_state_dict(trained.model, trainer.variables_of(trained.state))
    for name, values in given.items():
        if name.startswith("fc_layer.2.") or name.endswith("num_batches_tracked"):
            continue
        assert not np.array_equal(now[name], values), name
        if values.ndim == 4:
            assert np.linalg.norm(now[name] - values) < np.linalg.norm(values) / 2, name


@pytest.mark.slow
def test_a_finished_run_does_not_need_the_weights_it_started_from(run, data_dir, tmp_path):
    path = pathlib.Path(read_config(run).init_from)
    hidden = path.rename(tmp_path / "away")
    try:
        assert load(run, data_dir).epoch in (1, 2)
    finally:
        hidden.rename(path)


@pytest.mark.slow
def test_every_perturbation_is_tested_as_often_as_it_is_random(run, data_dir):
    found = files.read_json(run / "evaluation.json")
    assert [(one["perturb"], len(one["accuracies"])) for one in found["perturbations"]] == [
        (PERTURB[0], 2), (PERTURB[1], 1), (PERTURB[2], 2)]
    # Image by image, with the image's own key: what the table says can be had without the command.
    trained = load(run, data_dir)
    split = trained.dataset.test
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(accuracy.NOISE_SEED), 2), 0)
    images = np.stack([perturbations.parse_perturbation(PERTURB[0])(
        jax.random.fold_in(key, index), image[None].astype(np.float32) / 255)[0]
        for index, image in enumerate(split.images)])
    logits = trained.model.apply(
        trainer.variables_of(trained.state), images, train=False).logits
    assert found["perturbations"][0]["accuracies"][0] == np.mean(
        np.argmax(logits, axis=1) == split.labels)
    features = dict(np.load(run / "features.npz"))
    assert features["clean"].shape == (9, 8)
    assert str(features["noise"]) == "gaussian(40/255)+occlusion(2,4)"


@pytest.mark.slow
def test_predictions_are_the_networks_and_doubt_the_runs_score(run, folder, data_dir, capsys):
    paths = [folder / "snow" / "0.jpg", folder / "wet" / "3.jpg"]
    trained = load(run, data_dir)
    images = np.stack([data.read_image(path, (16, 20)) for path in paths])
    outputs = trained.model.apply(
        trainer.variables_of(trained.state), images.astype(np.float32) / 255, train=False)
    probabilities = np.exp(outputs.logits) / np.exp(outputs.logits).sum(axis=1, keepdims=True)
    best = probabilities.argmax(axis=1)
    score = doubt.load_doubt(run)
    found = list(predict.predict_files(trained, score, paths))
    for index, one in enumerate(found):
        assert one.label == ("dry", "snow", "wet")[best[index]]
        np.testing.assert_allclose(one.probability, probabilities[index].max(), rtol=1e-5)
    np.testing.assert_allclose([one.doubt for one in found], doubt.doubt_of(
        score.score, outputs.logits, outputs.features, score.statistics), rtol=1e-4)
    capsys.readouterr()
    assert call("predict", run, *paths, "--data-dir", data_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "class", "probability", "doubt"] and len(lines) == 4
    assert lines[3] == doubt.doubt_text(score)
    assert lines[1].split()[:3] == [str(paths[0]), found[0].label, f"{found[0].probability:.4f}"]


@pytest.mark.slow
def test_logits_that_are_not_finite_are_no_class(run, folder, data_dir):
    trained, paths = load(run, data_dir), [folder / "dry" / f"{i}.jpg" for i in range(3)]
    params = trained.state.params | {  # Finite, but not the product.
        layer: jax.tree.map(lambda leaf: leaf * 1e25, trained.state.params[layer])
        for layer in ("features", "head")}
    trained = trained._replace(state=trained.state.replace(params=params))
    with pytest.raises(InputError, match=r"for 3 of 3 images: \S+0.jpg, \S+1.jpg, \S+2.jpg\."):
        list(predict.predict_files(trained, doubt.UNMEASURED, paths))


@pytest.mark.slow
def test_an_exported_network_runs_without_this_package(run, folder, data_dir, tmp_path):
    out = tmp_path / "model.stablehlo"
    assert call("export", run, "--out", out, "--data-dir", data_dir) == 0
    images = np.stack([data.read_image(folder / "dry" / f"{i}.jpg", (16, 20)) for i in range(3)])
    np.save(tmp_path / "images.npy", images)
    script = ("import sys, pathlib, numpy as np, jax.export\n"
              "folder = pathlib.Path(sys.argv[1])\n"
              "network = jax.export.deserialize((folder / 'model.stablehlo').read_bytes())\n"
              "found = network.call(np.float32(np.load(folder / 'images.npy')) / 255)\n"
              "np.savez(folder / 'found.npz', **found)\n"
              "assert not {'jaxrobust', 'flax', 'experiments'} & set(sys.modules)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", script, str(tmp_path)], check=True,
                   env=environment, cwd=tmp_path)
    expected = predict.classify(load(run, data_dir), doubt.load_doubt(run), images)
    for name, values in np.load(tmp_path / "found.npz").items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["class_names"] == ["dry", "snow", "wet"]
    assert facts["doubt"]["threshold"] == files.read_json(run / "doubt.json")["threshold"]
    assert facts["input"] == {"shape": ["b", 16, 20, 3], "dtype": "float32",
                              "values": "RGB or grey, in [0, 1]"}
    assert facts["output"]["logits"] == ["b", 3]


@pytest.mark.slow
def test_a_finished_run_is_used_without_the_folder_it_was_trained_on(
        run, folder, data_dir, tmp_path, capsys):
    photographs = tmp_path / "photographs"
    shutil.copytree(folder, photographs)
    paths = [photographs / "dry" / "1.jpg", photographs / "wet" / "2.jpg"]

    def used(name):
        capsys.readouterr()
        assert call("predict", run, *paths, "--data-dir", tmp_path / "none") == 0
        said = capsys.readouterr().out
        for suffix in ("stablehlo", "safetensors"):
            assert call("export", run, "--out", tmp_path / f"{name}.{suffix}",
                        "--data-dir", tmp_path / "none") == 0
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        del facts["provenance"]
        exported = jax.export.deserialize((tmp_path / f"{name}.stablehlo").read_bytes())
        found = exported.call(np.float32(np.stack(
            [data.read_image(path, (16, 20)) for path in paths])) / 255)
        return (said, facts, {name: np.asarray(values).tolist() for name, values in found.items()},
                (tmp_path / f"{name}.safetensors").read_bytes())

    with_folder = used("with")
    hidden = folder.rename(tmp_path / "renamed")
    datasets._load_folder.cache_clear()
    try:
        assert used("without") == with_folder
        capsys.readouterr()
        for command in (("evaluate", run), ("train", "road_small/robust", "--data",
                                            f"folder:{folder}", "--out", run, "--resume")):
            assert call(*command, "--data-dir", data_dir) == 2
            assert f"at {folder}, got nothing" in one_line(capsys)
    finally:
        hidden.rename(folder)
        datasets._load_folder.cache_clear()


@pytest.mark.slow
def test_the_record_of_a_network_is_that_of_its_data_set_and_is_held_to_it(run, data_dir):
    assert network.read_network(run) == network.Network(
        (16, 20, 3), ("dry", "snow", "wet"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    trained = load(run, data_dir)
    for change, said in (
            ({"mean": (0.5, 0.5, 0.5)}, "was trained with mean="),
            ({"class_names": ("wet", "snow", "dry")}, "with 'wet' instead of 'dry' as class 0")):
        other = dataclasses.replace(trained.dataset, files=None, **change)
        with pytest.raises(InputError, match=said):
            trainer.load_run(run, trained.config, other)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused(run, folder, data_dir, tmp_path, capsys):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    trained = load(run, data_dir)
    params = jax.tree.map(np.array, trained.state.params)
    params["head"]["bias"][1:] = np.nan, np.inf
    state = trained.state.replace(params=params)
    shutil.rmtree(broken / "checkpoints")
    with contextlib.closing(
            checkpoints.open_checkpoints(broken / "checkpoints", keep=1)) as manager:
        checkpoints.save_checkpoint(manager, 99, {"state": state, "best": state}, {
            "epochs": files.read_lines(run / "metrics.jsonl"), "updates": {}})
    for command in (("predict", broken, folder / "dry" / "0.jpg"), ("export", broken)):
        capsys.readouterr()
        assert call(*command) == 2
        said = one_line(capsys)
        assert (f"epoch {trained.epoch}, got 2 that are NaN or infinite, the first in "
                "params.head.bias.") in said
    weights = pytorch.to_torch_state_dict(trained.model, trainer.variables_of(
        trained.state.replace(params=params)))
    pytorch.write_state_dict(tmp_path / "weights.safetensors", weights)
    with pytest.raises(InputError, match=r"finite weights in \S+safetensors, got 2 that are NaN"):
        pytorch.read_state_dict(tmp_path / "weights.safetensors")
    # Those of a file that a narrower dtype cannot hold.
    weights = {name: value.astype(np.float64) for name, value in pytorch.to_torch_state_dict(
        trained.model, trainer.variables_of(trained.state)).items()}
    weights["fc_layer.2.bias"][0] = 1e300
    with pytest.raises(InputError, match="got 1 that are NaN or infinite, the first in fc_layer.2"):
        pytorch.load_torch_weights(trained.model, trainer.variables_of(trained.state), weights)


@pytest.mark.slow
def test_weights_go_to_pytorch_and_back_to_the_same_bits(run, data_dir, tmp_path):
    out = tmp_path / "weights.safetensors"
    assert call("export", run, "--out", out, "--data-dir", data_dir) == 0
    trained = load(run, data_dir)
    variables = trainer.variables_of(trained.state)
    loaded = pytorch.load_torch_weights(
        trained.model, jax.tree.map(np.zeros_like, variables), pytorch.read_state_dict(out))
    assert not loaded.replaced
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


@pytest.mark.slow
def test_the_recipe_is_reproduced_on_a_folder_with_both_tables(
        folder, data_dir, tmp_path, monkeypatch):
    small = RECIPES["road_small"]
    rows = {row: dataclasses.replace(
        config, model="small_cnn", image_size=(32, 40), width=2, num_features=8, epochs=1,
        batch_size=8,
        optimizer=dataclasses.replace(config.optimizer, warmup_epochs=0.0))
        for row, config in small.rows.items() if row in ("both", "robust")}
    recipe = dataclasses.replace(
        small, rows=rows, evaluation=dataclasses.replace(small.evaluation, num_draws=2),
        curvature=dataclasses.replace(small.curvature, num_images=2, num_probes=2,
                                      smoothing_draws=3, batch_size=2))
    monkeypatch.setitem(RECIPES, "road_small", recipe)
    study = tmp_path / "study"
    assert call("reproduce", "road_small", "--data", f"folder:{folder}", "--data-dir", data_dir,
                "--no-tensorboard", "--out", study) == 0
    assert place_of(study, "robust", 0).joinpath("split.csv").is_file()
    page = (study / "report.md").read_text()
    for title in (TABLES["table3"].title, TABLE4.title, *TABLE4.rows):
        assert report._md(title) in page
    assert "94.05 ± 0.75" in page and "93.65 ± 0.49" in page
    lines = (study / "report.csv").read_text().splitlines()
    # Two rows, two draws.
    assert sum(',accuracy,"stripes(10,1)",' in line for line in lines) == 4


def test_table_4_is_beside_the_perturbations_of_both_recipes():
    for name in ("road", "road_small"):
        recipe = RECIPES[name]
        assert set(recipe.paper_perturbations) == set(recipe.evaluation.perturb)
        assert set(recipe.paper_perturbations.values()) == set(TABLE4.rows)
        assert recipe.evaluation.noise_levels == TABLES["table3"].levels
        assert set(TABLE4.methods) == set(TABLES["table3"].rows) == set(recipe.paper_rows.values())


def test_the_road_recipe_has_the_papers_settings():
    config = RECIPES["road"].rows["robust"]
    assert config.robust.delta_v == 0.5 and config.robust.delta_d == 3
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adam", 1e-4)
    assert config.optimizer.decay_epochs == (50,) and config.optimizer.decay_factor == 0.1
    assert (config.epochs, config.noise_std, config.image_size) == (70, 40 / 255, (400, 500))


@pytest.mark.slow
def test_bad_files_are_named_each_and_left_out_when_asked(data_dir, tmp_path, folder, capsys):
    bad = tmp_path / "bad"
    for label in ("dry", "wet"):
        (bad / label).mkdir(parents=True)
        for index in range(8):
            name = f"{label}/{index}.jpg"
            (bad / name).write_bytes((folder / name).read_bytes())
    (bad / "wet" / "1.jpg").write_bytes((folder / "wet" / "1.jpg").read_bytes()[:300])
    (bad / "dry" / "notes.docx").write_text("no image")
    (bad / "dry" / "Thumbs.db").write_text("no image")
    arguments = ("train", "road_small/normal", "--data", f"folder:{bad}", *SIZES, "--model",
                 "small_cnn", "--validation-size", "3", "--data-dir", data_dir, "--out",
                 tmp_path / "run")
    assert call(*arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[0].startswith("dry/notes.docx: ")
    assert said[1].startswith("wet/1.jpg: ") and "--skip-bad" in said[2]
    assert not (tmp_path / "run").exists()
    assert call(*arguments, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "Skipped 2 in all." in said
    assert f"Note: Ignored in {bad}, as not part of the data set: 1 files and folders" in said
    assert len(data.files_from_csv((tmp_path / "run" / "split.csv").read_text())) == 15


@pytest.mark.parametrize("arguments, expected", [
    (("train", "road/robust"), "Expected a path after dataset='folder:'"),
    (("train", "digits", "--data", "folder:nowhere"),
     "Expected a folder of images or a CSV file at nowhere, got nothing."),
    (("train", "digits", "--perturb", "occlusoin(2,3)"), "Did you mean 'occlusion'?"),
    (("train", "digits", "--augmentation", "photos"), "Did you mean 'photo'?"),
    (("train", "digits", "--optimizer.name", "adamw"), "Did you mean 'adam'?"),
    (("train", "digits", "--validation-size", "1.5"), "Expected validation_size=1.5 to be"),
    (("train", "digits", "--init-from", "weights.bin"), "Unknown suffix"),
    (("train", "digits", "--init-from", "none.pth"), "which does not exist"),
    (("predict", "nowhere", "image.png"), "Expected a run in nowhere"),
    (("export", "nowhere"), "Expected a run in nowhere"),
    (("perturb", "image.png"), "image.png"),
    (("perturb", "image.png", "--out", "picture.gif"), "Unknown suffix of the picture '.gif'"),
])
def test_what_cannot_be_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_perturb_command_draws_what_is_asked(folder, tmp_path, capsys):
    image = next((folder / "dry").glob("*.jpg"))
    out = tmp_path / "figures" / "perturbations.jpg"
    assert call("perturb", image, "--image-size", "40", "50", "--perturb", "gaussian(0.1)",
                "stripes(2,3)", "--out", out) == 0
    assert f"The picture is in {out}" in capsys.readouterr().out
    with PIL.Image.open(out) as picture:
        assert picture.width > 100
