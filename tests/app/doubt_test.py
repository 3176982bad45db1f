"""The score of doubt: which is chosen on held-out images, and what is said of it."""

import dataclasses
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from command_line import call, one_line

from jaxrobust import data, metrics
from jaxrobust._validate import InputError
from jaxrobust.app import doubt, files, predict, run_folder, trainer
from jaxrobust.app.recipe import RECIPES
from jaxrobust.losses import RobustLossConfig

pytestmark = pytest.mark.filterwarnings("default")  # Orbax warns about itself.

TINY = dataclasses.replace(
    RECIPES["digits"].rows["both"], train_size=100, validation_size=100, epochs=3,
    checkpoint_every=3, width=2, num_features=4, optimizer=dataclasses.replace(
        RECIPES["digits"].rows["both"].optimizer, warmup_epochs=0.0))


def test_the_score_that_tells_best_is_chosen_with_its_threshold():
    """Twenty images, of which the last five are wrong."""
    correct = np.arange(20) < 15
    found = doubt.choose_score({
        "probability": np.arange(20.)[::-1],  # The wrong ones are the least doubtful.
        "energy": np.where(correct, np.arange(20.), 100. - np.arange(20.)),
        "distance": np.r_[np.arange(1., 16.), 0.5, np.arange(16., 20.)]}, correct)
    assert found["auroc"] == {"probability": 0, "energy": 1, "distance": 60 / 75}
    assert (found["score"], found["num_images"], found["num_wrong"]) == ("energy", 20, 5)
    # Nine tenths are 18: the 15 right ones, and the three wrong ones that are doubted least.
    assert found["threshold"] == 100 - 17 and found["accepted"] == 0.9
    assert (found["accuracy"], found["accuracy_of_accepted"]) == (15 / 20, 15 / 18)
    text = doubt.doubt_text(doubt.Doubt("energy", None, {**found, "held_out": "test"}))
    assert text == (
        "Doubt is energy: on 20 test images, 5 of them classified wrongly, its AUROC is 1.00 (0.5 "
        "is chance, 1 perfect). Above 83 a prediction is doubtful: 90.0 % of them are not, and "
        "83.3 % of these are right, against 75.0 % of all.")


@pytest.mark.parametrize("num_wrong", [0, 4, 16, 20])
def test_too_few_wrong_or_right_ones_leave_the_probability_and_say_so(num_wrong):
    correct = np.arange(20) >= num_wrong
    found = doubt.choose_score(
        {"probability": np.zeros(20), "energy": 1. - correct}, correct)
    assert found["score"] == "probability" and found["auroc"] is None
    text = doubt.doubt_text(doubt.Doubt("probability", None, {**found, "held_out": "test"}))
    assert "fewer than 5 wrong or right predictions are too few for an AUROC" in text


def test_so_many_images_are_drawn_that_no_class_is_left_out(monkeypatch):
    monkeypatch.setattr(doubt, "MOST_IMAGES", 10)
    labels = np.r_[np.zeros(50, int), 1, np.full(3, 2)]  # One class of one image.
    stored = data.StoredImages(
        lambda rows: [np.full((1, 1, 1), row, np.uint8) for row in rows], 54, (1, 1, 1), "images")
    for images in (stored, np.arange(54, dtype=np.uint8).reshape(54, 1, 1, 1)):
        split = data.Split(images, labels)
        drawn = doubt.draw_images(split, [np.flatnonzero(labels == label) for label in range(3)])
        np.testing.assert_array_equal(np.bincount(drawn.labels), [4, 1, 3])
        np.testing.assert_array_equal(labels[drawn.images[:].ravel()], drawn.labels)
        assert len(set(drawn.images[:].ravel())) == 8
        assert len(doubt.draw_images(split, [np.arange(54)]).labels) == 10


@pytest.fixture(name="run", scope="module")
def _run(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer.train(TINY, digits, folder, tensorboard=False)
    return folder


def test_a_run_is_measured_at_first_use_on_the_images_that_chose_its_epoch(
        run, digits, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    trained, score = predict.load_classifier(folder, tmp_path)
    facts = files.read_json(folder / "doubt.json")
    validation = trainer.make_splits(digits, TINY).selection
    logits, features = doubt.outputs_of(trained, validation.images)
    correct = logits.argmax(axis=1) == validation.labels
    assert (facts["held_out"], facts["num_images"]) == ("validation", 100)
    assert facts["num_wrong"] == np.sum(~correct) >= 5
    assert facts["auroc"]["probability"] == metrics.auroc(
        np.asarray(metrics.improbability(logits)), correct)
    train = trainer.make_splits(digits, TINY).train
    statistics = metrics.class_statistics(
        doubt.outputs_of(trained, train.images)[1], train.labels, 10)
    assert facts["auroc"]["mahalanobis"] == metrics.auroc(np.asarray(
        metrics.mahalanobis_distance(features, logits.argmax(axis=1), statistics)), correct)
    # Whichever it is, what is loaded gives the score that was measured.
    for name in doubt.SCORES:
        assert np.isfinite(doubt.doubt_of(name, logits, features, statistics)).all()
    doubtful = doubt.doubt_of(score.score, logits, features, score.statistics) > facts["threshold"]
    assert np.mean(doubtful) == pytest.approx(1 - facts["accepted"])
    before = (folder / "doubt.json").stat().st_mtime_ns
    predict.load_classifier(folder, tmp_path)
    assert (folder / "doubt.json").stat().st_mtime_ns == before


def test_distances_to_centroids_are_those_of_directions_where_the_training_was(run):
    trained = trainer.load_run(run, TINY, None)
    images = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    means = np.asarray(trained.state.centroids.mean)

    def distances(method, direction):
        found = predict.classify(trained._replace(config=dataclasses.replace(
            TINY, method=method, robust=RobustLossConfig(delta_d=1.0, direction=direction))),
            doubt.UNMEASURED, images)
        return np.asarray(found["features"]), np.asarray(found["distances"])

    for method, direction in (("robust", True), ("robust", False), ("both", True)):
        features, found = distances(method, direction)
        in_direction = method == "robust" and direction
        expected = [[np.linalg.norm(q / np.linalg.norm(q) - m / np.linalg.norm(m))
                     if in_direction else np.linalg.norm(q - m) for m in means] for q in features]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_statistics_of_classes_are_kept_for_the_scores_that_need_them(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    # The distances have the largest numbers.
    monkeypatch.setattr(doubt.metrics, "auroc", lambda scores, _: float(scores.max()))
    _, score = predict.load_classifier(folder, tmp_path)
    assert score.score in ("distance", "mahalanobis")
    assert score.statistics.mean.shape == (10, 4) and score.statistics.precision.shape == (4, 4)


def test_a_run_whose_data_set_is_gone_is_used_unmeasured_and_says_why(
        run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)

    def gone(*_, **__):
        raise InputError("The data set is gone.")

    monkeypatch.setattr(predict, "open_dataset", gone)
    assert predict.load_classifier(folder, tmp_path)[1] == doubt.UNMEASURED
    assert "Cannot measure the doubt score: The data set is gone." in capsys.readouterr().err
    assert "is unknown" in doubt.doubt_text(doubt.UNMEASURED)


@pytest.mark.slow
def test_the_test_images_stand_in_where_no_image_chose_the_epoch(digits, tmp_path, capsys):
    config = dataclasses.replace(TINY, select="last", validation_size=0, epochs=1)
    trainer.train(config, digits, tmp_path / "run", tensorboard=False)
    assert call("evaluate", tmp_path / "run", "--noise-levels", "0", "--test-size", "50") == 0
    facts = files.read_json(tmp_path / "run" / "doubt.json")
    assert doubt.doubt_text(doubt.load_doubt(tmp_path / "run")) in capsys.readouterr().out
    assert (facts["held_out"], facts["num_images"]) == ("test", 360)


def test_what_is_not_finite_is_refused_with_its_number(run, digits, tmp_path):
    trained = trainer.load_run(run, TINY, digits)
    params = trained.state.params | {  # Finite, but not the product.
        layer: jax.tree.map(lambda leaf: leaf * 1e25, trained.state.params[layer])
        for layer in ("features", "head")}
    broken = trained._replace(state=trained.state.replace(params=params))
    with pytest.raises(InputError, match=r"Expected finite logits of validation images, got \d+"):
        doubt.measure_doubt(broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_score_that_another_command_measures_is_not_measured_beside_it(
        tmp_path, monkeypatch, capsys):
    run_folder.claim_run(tmp_path / "run", TINY)
    for name in ("load_run", "open_dataset"):
        monkeypatch.setattr(predict, name, lambda *_, **__: None)
    with run_folder.locked_facts(tmp_path / "run", "doubt"):
        assert call("predict", tmp_path / "run", "image.png") == 2
    assert one_line(capsys) == (f"error: Another command is making {tmp_path}/run/doubt.json. Wait "
                                "for its end, or stop it first.")


def test_predictions_of_a_folder_a_batch_at_a_time_are_those_of_all_at_once(
        run, digits, tmp_path, monkeypatch, capsys):
    for number, image in enumerate(digits.test.images[:7]):
        place = tmp_path / "images" / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image[..., 0]).save(place / f"{number}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_text("no image")
    trained, score = predict.load_classifier(run, tmp_path)
    paths = predict.files_in([tmp_path / "images"])
    assert [path.stem for path in paths] == ["0", "2", "4", "6", "1", "3", "5"]
    whole = list(predict.predict_files(trained, score, paths))
    read = []
    as_it_is = predict.data.read_image
    monkeypatch.setattr(predict.data, "read_image", lambda path, *rest: (
        read.append(path), as_it_is(path, *rest))[1])
    monkeypatch.setattr(predict, "batch_size_of", lambda images: 3)
    parts = predict.predict_files(trained, score, paths)
    assert read == [] and [next(parts).path, len(read)] == [paths[0], 3]
    for one, expected in zip([*predict.predict_files(trained, score, paths)], whole, strict=True):
        assert (one.path, one.label, one.doubtful) == (
            expected.path, expected.label, expected.doubtful)
        np.testing.assert_allclose(one[2:4], expected[2:4], rtol=1e-4)
    capsys.readouterr()
    assert call("predict", run, tmp_path / "images") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[1].startswith(str(paths[0]))
    column = lines[0].index("class")
    assert [line[column:].split()[0] for line in lines[1:8]] == [one.label for one in whole]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"Expected image files in \S+empty, found none"):
        predict.files_in([tmp_path / "empty"])
