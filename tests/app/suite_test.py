"""The suite of robustness measurements: of a run, an exported artefact and functions of images."""

import dataclasses
import itertools
import pathlib
import re
import shutil
import sys

import hypothesis
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import studies
from command_line import call, one_line
from hypothesis import strategies as st
from PIL import Image

from jaxrobust import corruptions, data, losses, metrics
from jaxrobust.app import classifiers, datasets, doubt, files, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import attacks, certificates, estimates, relative
from jaxrobust.app.measurements.corruptions import CORRUPTIONS, CorruptionSettings
from jaxrobust.app.measurements.flips import FLIPS, FlipSettings
from jaxrobust.app.measurements.relative import RELATIVE_ERRORS, RelativeSettings
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.report.card import write_card
from jaxrobust.app.study.plan import plan_study
from jaxrobust.app.study.run import run_study
from jaxrobust.attacks import fab
from jaxrobust.parallel import make_layout

pytestmark = pytest.mark.filterwarnings("default")

CORRUPT = ("--corruptions.names", "contrast", "--corruptions.severities", 1, 5)
CURVATURE = ("--suite", "curvature", "--limit", 4, "--curvature.num-probes", 3,
             "--curvature.smoothing-draws", 3)
CERTIFY = ("--certify.n0", 5, "--certify.n", 40, "--certify.sigma", 0.1)
ATTACK = ("--attacks.num-steps", 2, "--attacks.num-targets", 1, "--attacks.num-queries", 3,
          "--attacks.l2", 0)
BALLS = ("--attacks.linf", 0.02, 8 / 255, "--attacks.nearest", "l2")

USERS = '''
import jax
import jax.numpy as jnp
import numpy as np

from plain_user import brightness


def broken(images):
    return jnp.full((len(images), 10), jnp.nan)


def of_bytes(images):
    others = (jnp.abs(255 * images - jnp.round(255 * images)) > 1e-3).any(axis=(1, 2, 3))
    return jnp.where(others[:, None], jnp.nan, brightness(images))


def few(images):
    return brightness(images)[:, :3]


def noisy(key, images):
    return brightness(images + 0.01 * jax.random.normal(key, images.shape))


def whole_batch(key, images):
    return by_sight(images)


def by_sight(images):
    return jax.pure_callback(lambda images: np.zeros((len(images), 10), np.float32),
                             jax.ShapeDtypeStruct((len(images), 10), jnp.float32), images)
'''

@pytest.fixture(name="run", scope="module")
def _run(shared_study, tmp_path_factory):
    """A trained run, measured by the whole suite but the curvature."""
    folder = tmp_path_factory.mktemp("suite") / "run"
    shutil.copytree(shared_study / "robust-seed0", folder,
                    ignore=shutil.ignore_patterns("curvature*"))
    assert call("evaluate", folder, "--suite", "corruptions", "attacks", "certify", "calibration",
                "ood", "--limit", 20, *CORRUPT, *CERTIFY, *ATTACK, *BALLS) == 0
    return folder


@pytest.fixture(name="modules")
def _modules(tmp_path, monkeypatch):
    """A folder, which is the current one, with the user's modules."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    examples = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", page, re.DOTALL))
    assert list(examples) == ["plain_user", "nnx_user", "torch_user"]
    for name, text in {**examples, "users": USERS, "unwritten_user": "def f(:",
                       "failing_user": "raise ValueError('no weights')"}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_corruptions_are_counted_as_the_library_counts_them(run):
    facts = files.read_json(run / "corruptions.json")
    assert facts["origin"] == "generated" and facts["num_images"] == 20
    assert "20 of 360 test images, drawn at random by class with seed 0" == facts["subset"]
    counts = {(one["name"], one["severity"]): one["right"] for one in facts["counts"]}
    assert set(counts) == {("clean", 0), ("contrast", 1), ("contrast", 5)}
    errors = {"contrast": [1 - counts["contrast", severity] / 20 for severity in (1, 5)]}
    value, low, high = facts["mean"]
    assert value == pytest.approx(corruptions.mean_corruption_accuracy(errors))
    assert 0 <= low <= value <= high <= 1


def test_certificates_abstentions_and_radii_are_consistent(run):
    facts = files.read_json(run / "certificates.json")
    found = run_folder.read_arrays(run, "certificates")
    assert len(found["label"]) == 20 == facts["num_images"]
    assert facts["abstained"] == (found["label"] == -1).sum()
    right = found["label"] == found["target"]
    for one in facts["curve"]:
        assert one["right"] == (right & (found["radius"] >= one["radius"])).sum()
    assert found["radius"].max() <= facts["largest_radius"]
    value, low, high = facts["average_radius"]
    assert value == pytest.approx((found["radius"] * right).mean()) and low <= value <= high


def test_a_certification_resumes_where_it_was_interrupted(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "certificates.json").unlink()
    done, whole = [], certificates.certify

    def killed(*arguments, **options):
        if options["indices"] == [7] and not done.count("killed"):
            done.append("killed")
            raise KeyboardInterrupt
        done.append(options["indices"][0])
        return whole(*arguments, **options)

    monkeypatch.setattr(certificates, "certify", killed)
    again = ("evaluate", folder, "--suite", "certify", "--limit", 20, *CERTIFY)
    assert call(*again) == 130
    assert call(*again) == 0
    assert done == [*range(7), "killed", *range(7, 20)]
    before, after = (run_folder.read_arrays(place, "certificates") for place in (run, folder))
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def test_attacks_only_lower_the_accuracy_and_every_image_is_accounted_for(run):
    facts = files.read_json(run / "attacks.json")
    assert [(one["norm"], one["epsilon"]) for one in facts["norms"]] == [
        ("linf", 0.02), ("linf", 8 / 255)]
    table = run_folder.read_arrays(run, "attacks")
    for one in facts["norms"]:
        assert list(one["robust"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
        left = list(one["robust"].values())
        assert left == sorted(left, reverse=True)
        mine = table["epsilon"] == one["epsilon"]
        np.testing.assert_array_equal(table["index"][mine], np.arange(20))
        assert (table["broken_by"][mine] == "").sum() == left[-1]


def test_the_nearest_adversarial_images_are_kept_one_by_one(run, digits):
    facts, table = files.read_json(run / "attacks.json"), run_folder.read_arrays(run, "attacks")
    mine = np.isinf(table["epsilon"])
    distance, (one,) = table["distance"][mine], facts["nearest"]
    assert set(table["norm"][mine]) == {"l2"} and len(distance) == 20
    # Those that are misclassified as they are, and none else, have none to go.
    clean = table["broken_by"][table["epsilon"] == 0.02] == "clean"
    np.testing.assert_array_equal(distance == 0, clean)
    assert one["not_found"] == np.isinf(distance).sum()
    assert one["median"][0] == pytest.approx(np.median(distance))
    assert one["median_right"][0] == pytest.approx(np.median(distance[~clean]))
    trained = trainer.load_run(run, run_folder.read_config(run), digits)
    split = estimates.subset_of(digits.test, 20)
    np.testing.assert_array_equal(table["label"][mine], split.labels)
    _, expected = fab(trained.logits_fn, split.images, split.labels, norm="l2", num_steps=2,
                      num_targets=1)
    np.testing.assert_allclose(distance, expected, rtol=1e-5)


def test_the_distance_counts_images_for_which_nothing_was_found():
    found = attacks._of_nearest("l2", np.array([0, 0.1, 0.2, 0.4, np.inf, 0.3]))
    assert found["not_found"] == 1
    assert found["median"][0] == pytest.approx(0.25)
    assert found["median_right"][0] == pytest.approx(0.3)
    assert all(low <= value <= high for value, low, high in (
        found["median"], found["median_right"]))
    none = attacks._of_nearest("l2", np.array([0, np.inf, np.inf]))
    assert none["median"] is None is none["median_right"]
    assert attacks._of_nearest("l2", np.zeros(3))["median_right"] is None


def test_the_suite_of_a_study_is_measured_once_and_on_the_images_of_its_curvature(
        shared_study, tmp_path, digits):
    folder = tmp_path / "study"
    shutil.copytree(shared_study, folder)
    plan = dataclasses.replace(plan_study(studies.RECIPE, folder), suites={
        "certificates": certificates.CertificateSettings(n0=5, n=40, limit=8),
        "corruptions": CorruptionSettings(("contrast",), (1,))})
    assert "certificates: 0 of 2 runs done" in plan.text()
    assert run_study(plan, digits) == []
    assert "certificates: 2 of 2 runs done" in plan.text()
    drawn, whole = data.split_off(digits.test, 50, seed=0)[1], {}
    for place in plan.places():
        found, curvature = (run_folder.read_arrays(place, kind)
                            for kind in ("certificates", "curvature"))
        np.testing.assert_array_equal(found["index"], np.arange(8))
        np.testing.assert_array_equal(found["target"], drawn.labels[:8])
        np.testing.assert_array_equal(found["target"], curvature["label"][:8])
        # Clean accuracy is that of the study's own evaluation.
        clean = files.read_json(place / "corruptions.json")["counts"][0]
        level = files.read_json(place / "evaluation.json")["levels"][0]
        assert clean["right"] / clean["number"] == pytest.approx(level["accuracies"][0])
        whole |= {path: path.stat().st_mtime_ns for path in place.glob("*.json")}
    assert run_study(plan, digits) == []
    assert {path: path.stat().st_mtime_ns for path in whole} == whole


def test_the_images_of_a_study_are_the_first_of_its_subset(digits):
    drawn = data.split_off(digits.test, 50, seed=0)[1]
    part, facts = estimates.images_of(digits.test, 20, 50)
    np.testing.assert_array_equal(part.images, drawn.images[:20])
    np.testing.assert_array_equal(part.labels, drawn.labels[:20])
    assert facts == {
        "subset": "the first 20 of 50 of 360 test images, drawn at random by class with seed 0",
        "num_images": 20, "first_of": 50, "num_test": 360}
    for limit, test_size, words, first_of in (
            (20, 360, "the first 20 of 360 test images", 360),
            (20, None, "20 of 360 test images, drawn at random by class with seed 0", 20),
            (None, 50, "50 of 360 test images, drawn at random by class with seed 0", 50),
            (None, None, "all 360 test images", 360)):
        _, facts = estimates.images_of(digits.test, limit, test_size)
        assert (facts["subset"], facts["first_of"]) == (words, first_of)
    with pytest.raises(InputError, match="test_size=361"):
        estimates.images_of(digits.test, 20, 361)


@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_images_of_classes_that_cannot_be_on_both_sides_are_drawn_by_their_shares(counts, drawn):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    number = drawn.draw(st.integers(1, len(labels)))
    rows = estimates.rows_by_class(labels, number)
    assert len(np.unique(rows)) == number and (np.diff(rows) > 0).all()
    taken = np.bincount(labels[rows], minlength=len(counts))
    assert (np.abs(taken - number * np.array(counts) / len(labels)) < 1).all()


@pytest.mark.parametrize("counts", [[51, 51], [99, 1], [3, 5000]])
def test_a_limit_takes_its_number_of_images_whatever_the_classes(counts):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    split = data.Split(np.zeros((len(labels), 1, 1, 1), np.uint8), labels)
    for limit in (1, len(labels) - 1):
        assert len(estimates.subset_of(split, limit).labels) == limit


def test_warnings_of_the_ensemble_are_over_all_batches():
    batch = {"attacks": ["clean", "apgd-ce", "square"], "warnings": {"random": "once"},
             "zero_gradients": 2}
    few = attacks._of_ball("l2", 0.5, np.array(["square"] + [""] * 999), [batch, batch])
    many = attacks._of_ball("l2", 0.5, np.array(["square"] * 3 + [""] * 997), [batch])
    assert few["warnings"].keys() == {"random", "zero_gradients"}
    assert few["warnings"]["random"] == "once" and few["robust"]["square"] == 999
    assert "Gradients are zero in 4 runs" in few["warnings"]["zero_gradients"]
    assert "zero_gradients" not in attacks._of_ball(
        "l2", 0.5, np.array([""]), [batch | {"zero_gradients": 0}])["warnings"]
    assert "0.30 points" in many["warnings"]["black_box"]


def test_the_temperature_is_fitted_on_held_out_images_and_lowers_nothing_but_confidence(run):
    facts = files.read_json(run / "calibration.json")
    assert "validation images" in facts["fitted_on"] and facts["num_images"] == 20
    for scores in facts["scores"].values():
        for value, low, high in scores.values():
            assert low <= value <= high
    if facts["temperature"] is None:
        assert "a temperature is the better" in facts["without_temperature"]
    else:
        before, after = facts["scores"].values()
        area = "area under accuracy against coverage"
        assert 0 < after[area][0] <= 1 and before.keys() == after.keys()


def test_accuracy_against_coverage_is_of_the_doubt_that_predict_prints(run):
    facts, curve = (read(run, "calibration") for read in (
        run_folder.read_facts, run_folder.read_arrays))
    score = doubt.load_doubt(run)
    assert facts["doubt"]["score"] == doubt.SCORES[score.score]
    config = run_folder.read_config(run)
    loaded = trainer.load_run(run, config, data.load_dataset("digits"), None)
    split = estimates.subset_of(loaded.dataset.test, 20)
    logits, features = doubt.outputs_of(loaded, split.images)
    values = np.asarray(doubt.doubt_of(score.score, logits, features, score.statistics))
    right = logits.argmax(axis=1) == split.labels
    own = metrics.coverage_curve(values, right)
    np.testing.assert_allclose(curve["accepted"], own.coverage)
    np.testing.assert_allclose(curve["accuracy_of_accepted"], own.accuracy)
    value, low, high = facts["doubt"]["area"]
    assert low <= value <= high and value == pytest.approx(own.area)
    assert "accuracy against coverage" in (run / "card.md").read_text().lower()


def test_strange_images_are_told_apart_by_scores_of_logits_and_features(run):
    facts = files.read_json(run / "ood.json")
    assert facts["settings"]["strange"] == ["uniform_noise"]  # Digits are the run's own data set.
    scores = facts["detection"]["uniform_noise"]
    assert set(scores) == {"probability", "energy", "Mahalanobis", "centroid", "neighbours"}
    assert scores["neighbours"]["AUROC"][0] > 0.75  # Noise looks like no digit.
    assert set(scores["energy"]) == {"AUROC", "AUPR, strange positive", "AUPR, familiar positive",
                                     "FPR at 95 %"}
    for value, low, high in (values for score in scores.values() for values in score.values()):
        assert 0 <= low <= value <= high <= 1


def test_a_second_call_measures_nothing_and_other_settings_are_refused(run, capsys):
    times = {path: path.stat().st_mtime_ns for path in run.glob("*.json")}
    again = ("evaluate", run, "--suite", "corruptions", "certify", *CERTIFY, *CORRUPT)
    assert call(*again, "--limit", 20) == 0
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.json")} == times
    capsys.readouterr()
    assert call(*again, "--limit", 10) == 2
    assert "was made with limit=20, not 10" in one_line(capsys)


def test_other_settings_of_a_later_suite_are_refused_before_any_work(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "corruptions.json").unlink()
    assert call("evaluate", folder, "--suite", "corruptions", "ood", "--limit", 10, *CORRUPT) == 2
    assert "ood.json was made with limit=20, not 10" in one_line(capsys)
    assert not (folder / "corruptions.json").is_file()


@pytest.mark.parametrize("name", [None, "few"])
def test_all_keeps_what_is_there_of_as_many_images_unless_told_otherwise(name, modules, capsys):
    named = () if name is None else ("--name", name)
    user = ("evaluate", "plain_user:brightness", "--data", "digits", *named)
    assert call(*user, "--noise-levels", 0, 100, "--num-draws", 1) == 0
    folder, end = modules / "runs" / "plain_user.brightness", "" if name is None else "-few"
    rest = ("--suite", "all", *CORRUPT, *ATTACK, *CERTIFY, *CURVATURE[4:], "--limit", 20)
    assert call(*user, *rest) == 0
    assert f"There already: {pathlib.Path('runs/plain_user.brightness')}/evaluation{end}.json" in (
        capsys.readouterr().out)
    table = pd.read_csv(folder / f"card{end}.csv")
    noise = table[table.suite == "noise"]
    assert set(noise.condition) == {"clean", "100/255"} and set(noise.subset) == {
        "360 test images"}
    assert set(table.suite) >= {"attacks", "certify", "curvature"}
    for options, expected in (
            (("--noise-levels", 0, 10), "noise_levels=[0.0, 100.0], not [0.0, 10.0]"),
            (("--limit", 30), "was made with limit=20, not 30")):
        assert call(*user, *rest, *options) == 2
        assert expected in one_line(capsys)
    # A limit of all images, or more, is none.
    assert call(*user, "--noise-levels", 0, 100, "--num-draws", 1, "--limit", 500) == 0


def test_a_named_card_has_the_numbers_of_its_name(modules):
    user = ("evaluate", "plain_user:brightness", "--data", "digits", "--num-draws", 1)
    assert call(*user, "--noise-levels", 0, "--limit", 60) == 0
    assert call(*user, "--noise-levels", 0, 100, "--limit", 100, "--name", "other") == 0
    folder = modules / "runs" / "plain_user.brightness"
    for end, number, conditions in (("", 60, ["clean"]), ("-other", 100, ["clean", "100/255"])):
        levels = files.read_json(folder / f"evaluation{end}.json")["levels"]
        table = pd.read_csv(folder / f"card{end}.csv")
        assert list(table.condition) == conditions
        assert set(table.subset) == {f"{number} test images"}
        np.testing.assert_allclose(
            table.value, [100 * np.mean(level["accuracies"]) for level in levels])


def test_results_of_a_function_belong_to_its_weights_and_its_images(modules, capsys):
    (modules / "weighted.py").write_text(
        "import numpy as np\n\ndef logits(images):\n"
        "    return images.reshape(len(images), -1)[:, :10] @ np.load('weights.npy')\n")
    np.save("weights.npy", np.eye(10, dtype=np.float32))
    random = np.random.default_rng(0)
    for part, label, index in itertools.product(("train", "test"), "ab", range(6)):
        path = modules / "pictures" / part / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    few = ("--noise-levels", 0)
    known = ("evaluate", "weighted:logits", "--data", "digits", *few)
    assert call(*known) == 0
    assert call(*known) == 0
    np.save("weights.npy", 2 * np.eye(10, dtype=np.float32))
    capsys.readouterr()
    assert call(*known) == 2
    assert "weighted:logits with other weights: the largest logit of test image" in one_line(capsys)

    (modules / "sized.py").write_text(
        "import jax.numpy as jnp\n\ndef logits(images):\n"
        "    return jnp.tile(jnp.array([0.0, 1.0]), (len(images), 1))\n")
    of_folder = ("evaluate", "sized:logits", "--data", f"folder:{modules / 'pictures'}", *few)
    assert call(*of_folder, "--image-size", 8, 8) == 0
    assert call(*of_folder, "--image-size", 8, 8) == 0
    capsys.readouterr()
    assert call(*of_folder, "--image-size", 16, 16) == 2
    assert "holds another configuration (see model.json there)" in one_line(capsys)
    (modules / "pictures" / "test" / "a" / "0.png").unlink()
    datasets._load_folder.cache_clear()  # As in another process.
    assert call(*of_folder, "--image-size", 8, 8) == 2
    assert "holds another configuration (see model.json there)" in one_line(capsys)


def test_a_model_without_derivatives_is_measured_as_far_as_it_goes(modules, capsys):
    assert call("evaluate", "users:by_sight", "--data", "digits", "--suite", "all", "--limit", 20,
                "--num-draws", 1, *CORRUPT, *CERTIFY) == 0
    assert "Left out: attacks, curvature, since users.by_sight has no derivatives" in (
        capsys.readouterr().out)
    card = (modules / "runs" / "users.by_sight" / "card.md").read_text()
    assert "Not measured: flips, relative, attacks, curvature." in card


def test_what_was_measured_before_a_failure_is_on_the_card(modules, capsys):
    assert call("evaluate", "users:of_bytes", "--data", "digits", "--suite", "calibration", "ood",
                "--limit", 20) == 2
    assert "NaN" in one_line(capsys)
    card = (modules / "runs" / "users.of_bytes" / "card.md").read_text()
    assert "Brier score" in card and "Not measured: noise, corruptions" in card


def test_the_card_states_every_number_with_interval_subset_and_seed(run):
    page, text = ((run / f"card.{suffix}").read_text() for suffix in ("html", "md"))
    for words in ("Robustness card", "Not measured: flips, relative, curvature", "robust accuracy",
                  "drawn at random by class with seed 0", "sigma 0.1"):
        assert words in page and words in text.replace("\\", "")
    table = pd.read_csv(run / "card.csv")
    assert set(table.suite) >= {"corruptions", "attacks", "certify", "calibration", "ood"}
    assert set(table.seed) == {0}
    assert table.subset.notna().all()
    known = table.dropna(subset="low")
    assert ((known.low <= known.value) & (known.value <= known.high)).all() and len(known) > 20
    assert (known.interval != "").all()


def test_an_exported_artefact_gives_the_numbers_of_its_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("export", run, "--out", tmp_path / "net.stablehlo") == 0
    assert call("evaluate", tmp_path / "net.stablehlo", "--data", "digits", "--suite",
                "corruptions", "attacks", "ood", "--limit", 20, *CORRUPT, *ATTACK, *BALLS) == 0
    exported = jax.export.deserialize(bytearray((tmp_path / "net.stablehlo").read_bytes()))
    images = jnp.zeros((3, 8, 8, 1))  # Where distances of features may have no derivatives.
    gradient = jax.grad(lambda images: exported.call(images)["logits"][:, 0].sum())(images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    folder = tmp_path / "runs" / "net"
    for kind, part in (("corruptions", "counts"), ("attacks", "norms")):
        own, its = (files.read_json(place / f"{kind}.json")[part] for place in (folder, run))
        assert own == its
    own, its = (files.read_json(place / "ood.json")["detection"]["uniform_noise"]
                for place in (folder, run))
    assert own["energy"]["AUROC"][0] == pytest.approx(its["energy"]["AUROC"][0], abs=0.01)
    assert own.keys() == its.keys()
    assert (folder / "card.html").is_file()


@pytest.mark.slow
def test_first_derivatives_alone_give_an_artefact_a_part_of_its_runs_curvature(
        run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("export", run, "--out", tmp_path / "net.stablehlo") == 0
    assert call("evaluate", run, *CURVATURE, "--name", "c") == 0
    capsys.readouterr()
    smoothing = files.read_json(run / "curvature-c.json")["settings"]["smoothing"]
    assert call("evaluate", tmp_path / "net.stablehlo", "--data", "digits", *CURVATURE,
                "--curvature.smoothing", smoothing) == 0
    assert "No exact Hessian of net, only what first derivatives tell" in capsys.readouterr().out
    own = run_folder.read_arrays(tmp_path / "runs" / "net", "curvature")
    its = run_folder.read_arrays(run, "curvature", "c")
    assert its.keys() - own.keys() == {name for norm in ("frobenius_squared", "trace",
                                                         "spectral_norm")
                                       for name in (norm, f"{norm}_standard_error")}
    for name, values in own.items():
        scale = np.abs(its["spectral_norm"]).max() if "eigenvalue" in name else 0
        np.testing.assert_allclose(values, its[name], rtol=2e-3, atol=1e-5 * scale)
    card = (tmp_path / "runs" / "net" / "card.md").read_text()
    assert "No exact Hessian of net" in card and "Finite differences" in card


def test_the_curvature_of_a_users_model_is_exact_where_jax_differentiates_it_twice(modules):
    assert call("evaluate", "nnx_user:logits", "--data", "digits", *CURVATURE) == 0
    folder = modules / "runs" / "nnx_user.logits"
    facts, found = files.read_json(folder / "curvature.json"), run_folder.read_arrays(
        folder, "curvature")
    assert facts["piecewise_linear"] is True and facts["settings"]["smoothing"] is None
    assert facts["subset"] == "the first 4 of 360 test images"
    split = data.load_dataset("digits").test
    logits_fn = sys.modules["nnx_user"].logits

    def loss(pixels, label):
        return losses.softmax_cross_entropy(logits_fn(pixels[None]), label[None])[0]

    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(
        jnp.asarray(split.images[:4].reshape(4, -1) / np.float32(255)),
        jnp.asarray(split.labels[:4]))
    np.testing.assert_allclose(found["frobenius_squared"], np.sum(np.square(hessians), (1, 2)),
                               rtol=1e-3)
    assert "median curvature" in (folder / "card.csv").read_text()


def test_calls_of_other_programs_have_first_derivatives_along_a_further_axis():
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)

    def callback(function, like):
        return lambda *arrays: jax.pure_callback(
            function, jax.ShapeDtypeStruct((len(arrays[0]), like), jnp.float32), *arrays)

    hidden = jax.custom_vjp(callback(lambda x: np.square(x) @ weights, 3))
    hidden.defvjp(lambda x: (hidden(x), x), lambda x, z: (callback(
        lambda x, z: 2 * x * (z @ weights.T), 4)(x, z),))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2, 4)), jnp.float32)

    def gradients(logits_fn):
        return jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(logits_fn(x)))))(x)

    np.testing.assert_allclose(
        gradients(classifiers.once_differentiable(hidden)),
        gradients(lambda x: jnp.square(x) @ weights), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="vmap"):
        gradients(hidden)


def test_a_randomised_model_is_attacked_through_expectations(modules, capsys):
    again = ("evaluate", "users:noisy", "--data", "digits", "--suite", "all", "--limit", 20,
             *ATTACK)
    assert call(*again, "--attacks.eot", 3) == 0
    folder = modules / "runs" / "users.noisy"
    facts = files.read_json(folder / "attacks.json")
    assert facts["settings"]["eot"] == 3
    assert list(facts["norms"][0]["robust"]) == ["clean", "apgd-ce", "apgd-dlr"]
    card = (folder / "card.md").read_text()
    assert "3 draws in each expectation" in card and "Not measured: noise, corruptions" in card
    capsys.readouterr()
    assert call(*again) == 2
    assert "was made with eot=3, not 20" in one_line(capsys)


@pytest.mark.parametrize("model", ["plain_user:brightness", "nnx_user:logits", "torch_user:logits"])
def test_a_users_own_model_is_tested_like_a_run(model, modules):
    if model.startswith("torch"):
        pytest.importorskip("torch")
    assert call("evaluate", model, "--data", "digits", "--limit", 20, "--noise-levels", 0, 32,
                "--num-draws", 1, "--suite", "noise", "attacks", "ood", *ATTACK) == 0
    folder = modules / "runs" / model.replace(":", ".")
    assert set(files.read_json(folder / "ood.json")["detection"]["uniform_noise"]) == {
        "probability", "energy"}
    assert files.read_json(folder / "evaluation.json")["num_images"] == 20
    assert model in (folder / "card.md").read_text().replace("\\", "")


def test_a_report_shows_a_run_and_a_users_model_side_by_side(run, modules):
    assert call("evaluate", "plain_user:brightness", "--data", "digits", "--limit", 20,
                "--noise-levels", 0, 32, "--num-draws", 1, "--suite", "noise", "corruptions",
                *CORRUPT) == 0
    folder = modules / "runs" / "plain_user.brightness"
    assert call("report", run, folder, "--out", modules / "report") == 0
    page = (modules / "report" / "report.html").read_text()
    assert 'id="corruptions"' in page and 'id="certificates"' in page
    assert "plain_user.brightness" in page
    numbers = (modules / "report" / "report.csv").read_text()
    assert "robust accuracy,L∞ 8/255" in numbers and "upper end (Wilson, 95 %)" in numbers


@pytest.mark.parametrize("words, expected", [
    (("RUN", "--suite", "corruption"), "Unknown suite 'corruption'. Did you mean 'corruptions'?"),
    (("RUN", "--suite", "noise", "noise"), "suite"),
    (("plain_user:brightness",), "Expected --data for plain_user:brightness"),
    (("RUN", "--data", "digits"), "Expected data only with models that are no runs"),
    (("plain_user:brightnes", "--data", "digits"), "Did you mean 'brightness'?"),
    (("nowhere_user:f", "--data", "digits"), "Cannot import 'nowhere_user'"),
    (("users:few", "--data", "digits"), "Expected users:few to return logits [2, 10]"),
    (("users:broken", "--data", "digits", "--limit", 20), "for 20 of 20 images"),
    (("users:by_sight", "--data", "digits", "--suite", "curvature"),
     "Expected users.by_sight to have derivatives"),
    (("users:by_sight", "--data", "digits", "--suite", "attacks"),
     "Expected users.by_sight to have derivatives, for the suite attacks: Pure callbacks"),
    (("unwritten_user:f", "--data", "digits"), "Cannot import 'unwritten_user' of"),
    (("failing_user:f", "--data", "digits"), "Cannot import 'failing_user' of failing_user:f: no"),
    ((":f", "--data", "digits"), "Cannot import '' of :f"),
    ((".x:f", "--data", "digits"), "Cannot import '.x' of .x:f"),
    (("a/net.stablehlo", "b/net.stablehlo", "--data", "digits"),
     "Expected models of different names, which name the folders of their results"),
    (("plain_user:brightness", "--data", "digits", "--suite", "curvature", "--curvature.inputs",
      "normalised"), "Expected inputs='normalised' only with runs"),
    (("users:noisy", "--data", "digits", "--suite", "attacks", "ood"),
     "Expected a function of images alone for the suite 'ood', got users.noisy"),
    (("users:whole_batch", "--data", "digits", "--suite", "attacks"),
     "users:whole_batch fails on float32 images [2, 8, 8, 1] of digits: vmap is only"),
    (("users:noisy", "--data", "digits", "--suite", "attacks", "--attacks.nearest", "l2"),
     "Expected nearest=['l2'] only with a function of images alone"),
    (("RUN", "--suite", "attacks", "--attacks.eot", 5, "--name", "n"), "Expected eot=5 only with"),
    (("RUN", "--suite", "flips"), "Expected --flips.files with the suite 'flips', got none."),
    (("RUN", "--suite", "relative"), "Expected --relative.baseline with the suite 'relative'"),
    (("RUN", "--suite", "relative", "--relative.baseline", "."), "found neither config.json nor"),
    (("nowhere.stablehlo", "--data", "digits"), "found no such file"),
    (("RUN", "--suite", "attacks", "--attacks.linf", 0, "--attacks.l2", 0), "to be > 0"),
    (("RUN", "--suite", "attacks", "--attacks.linf", 0.1, 0.1), "Expected each linf once"),
    (("RUN", "--suite", "attacks", "--attacks.nearest", "l1"), "Unknown norm 'l1'"),
    (("RUN", "--suite", "ood", "--ood.strange", "digits"), "its own data set"),
    (("RUN", "--suite", "corruptions", "--corruptions.names", "fogg"), "Did you mean 'fog'?"),
])
def test_bad_input_is_one_line(words, expected, run, modules, capsys):
    assert call("evaluate", *(run if word == "RUN" else word for word in words)) == 2
    assert expected in one_line(capsys)


def test_official_files_of_corruptions_are_read_and_said_to_be(run, tmp_path, capsys):
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(10, np.int64))
    assert call("evaluate", run, "--suite", "corruptions", "--corruptions.names", "fog",
                "--corruptions.files", tmp_path, "--name", "official", "--limit", 20) == 2
    assert "Expected images [8, 8, 1] as of digits" in one_line(capsys)


def linear_model(seed, images, labels, num_classes=2, shape=(4, 4, 3)):
    """A classifier that was not trained, and its test images."""
    split = data.Split(images, labels)
    dataset = data.Dataset("mine", split, split, tuple(map(str, range(num_classes))), (0.5,) * 3,
                           (0.2,) * 3, False)
    weights = np.random.default_rng(seed).normal(size=(np.prod(shape), num_classes))
    weights = jnp.asarray(weights - weights.mean(axis=0), jnp.float32)
    return classifiers.ForeignModel("mine", dataset, make_layout("jit"), jax.tree_util.Partial(
        lambda weights, images: images.reshape(len(images), -1) @ weights, weights))


def claimed(folder):
    folder.mkdir()
    files.write_json(folder / "model.json", {"model": folder.name, "dataset": "mine", "sha256": "",
                                             "class_names": ["0", "1"]})
    return folder


@pytest.fixture(name="official")
def _official(tmp_path):
    """Folders in the formats of CIFAR-10-C and CIFAR-10-P, of 12 images or sequences."""
    random = np.random.default_rng(0)
    labels = np.tile(np.arange(12) % 2, 5)
    for name in ("c", "p"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "c" / "labels.npy", labels)
    for name in ("fog", "snow"):
        np.save(tmp_path / "c" / f"{name}.npy",
                random.integers(256, size=(60, 4, 4, 3), dtype=np.uint8))
    for name, length in (("tilt", 5), ("gaussian_noise", 3)):
        np.save(tmp_path / "p" / f"{name}.npy",
                random.integers(256, size=(12, length, 4, 4, 3), dtype=np.uint8))
    return tmp_path


def test_official_files_are_measured_with_their_own_images_and_labels(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(256, size=(15, 4, 4, 3), dtype=np.uint8)  # 3 images, 5 severities.
    images[:, 0, 0, 0] = np.tile([0, 255, 255], 5)
    labels = np.array([0, 1, 0] * 4 + [0, 1, 1])  # The last severity is all right.
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    model = linear_model(0, images[:3], np.array([0, 1, 1], np.int32))._replace(
        logits_fn=jax.tree_util.Partial(lambda images: jnp.stack(
            [1 - images[:, 0, 0, 0], images[:, 0, 0, 0]], axis=1)))
    facts = measure(CORRUPTIONS, model, CorruptionSettings(
        ("fog",), (4, 5), str(tmp_path)), tmp_path, "mine")
    assert facts["origin"] == "official" and f"of the files {tmp_path}" in facts["subset"]
    assert [one["right"] for one in facts["counts"]] == [3, 2, 3]
    assert facts["mean"][0] == pytest.approx(5 / 6)


def test_what_tfds_has_prepared_is_measured_as_official(official, monkeypatch):
    from jaxrobust.app.measurements import corruptions as measurement

    opened = []

    def load(name, severity, data_dir):
        opened.append((name, severity, data_dir))
        return data.load_corrupted(official / "c", name, severity)

    monkeypatch.setattr(measurement, "load_corrupted_tfds", load)
    model = linear_model(0, np.zeros((12, 4, 4, 3), np.uint8), (np.arange(12) % 2).astype(np.int32))
    expected, facts = (measure(
        CORRUPTIONS, model, CorruptionSettings(("fog",), (2,), files, "there"), official, "mine",
        name) for files, name in ((str(official / "c"), "files"), ("tfds", "tfds")))
    assert facts["counts"] == expected["counts"] and facts["origin"] == "official"
    assert "all 12 test images of cifar10_corrupted of TensorFlow Datasets" == facts["subset"]
    assert set(opened) == {("fog", 2, "there")} and "data_dir" not in facts["settings"]


def test_errors_and_flips_are_compared_with_a_baseline_of_the_same_images(official):
    random = np.random.default_rng(3)
    images = random.integers(256, size=(12, 4, 4, 3), dtype=np.uint8)
    settings = CorruptionSettings(("fog", "snow"), (1, 3), str(official / "c"))
    flip_settings = FlipSettings(str(official / "p"), ("tilt", "gaussian_noise"))
    logits_fn = linear_model(1, images, np.zeros(12, np.int32)).logits_fn
    labels = np.argmax(logits_fn(images / np.float32(255)), axis=1).astype(np.int32)
    found, models = [], [linear_model(seed, images, labels) for seed in (0, 1)]
    for model, name in zip(models, ("own", "base"), strict=True):
        folder = claimed(official / name)
        found.append((measure(CORRUPTIONS, model, settings, folder, name),
                      measure(FLIPS, model, flip_settings, folder, name)))
    facts = measure(RELATIVE_ERRORS, models[0], RelativeSettings(str(official / "base")),
                    official / "own", "own")

    def errors(one):
        return {name: [1 - count["right"] / 12 for count in one["counts"] if count["name"] == name]
                for name in ("fog", "snow", "clean")}

    own, base = (errors(one) for one, _ in found)
    clean, baseline_clean = own.pop("clean")[0], base.pop("clean")[0]
    scores = facts["scores"]
    assert scores["mCE"]["value"] == pytest.approx(corruptions.mean_corruption_error(own, base))
    low, high = scores["mCE"]["interval"]
    assert low <= scores["mCE"]["value"] <= high
    assert scores["relative mCE"]["value"] == pytest.approx(
        corruptions.relative_mean_corruption_error(
            own, base, clean=clean, baseline_clean=baseline_clean))
    assert clean > 0 == baseline_clean
    rates = []
    for model, (_, flips) in zip(models, found, strict=True):
        rates.append({})
        for name in ("tilt", "gaussian_noise"):
            sequences = data.load_perturbed(official / "p", name)
            predicted = np.argmax(model.logits_fn(jnp.asarray(
                sequences.images.reshape(-1, 4, 4, 3) / np.float32(255))), axis=1)
            rates[-1][name] = corruptions.flip_rate(
                predicted.reshape(12, -1), noise=name == "gaussian_noise")
            assert flips["rates"][name][0] == pytest.approx(rates[-1][name])
        assert flips["mean"][0] == pytest.approx(np.mean(list(rates[-1].values())))
    assert scores["mFR"]["value"] == pytest.approx(corruptions.mean_flip_rate(*rates))
    card = write_card(official / "own").with_suffix(".md").read_text()
    assert "mCE, against base, official" in card and "flip rate, tilt, official" in card
    other = claimed(official / "other")
    measure(CORRUPTIONS, models[1], dataclasses.replace(settings, limit=6), other, "other")
    (official / "own" / "relative.json").unlink()
    with pytest.raises(InputError, match=r"corruptions of the baseline .* with limit=12.*got 6"):
        measure(RELATIVE_ERRORS, models[0], RelativeSettings(str(other)), official / "own", "own")


def test_a_score_that_the_baseline_leaves_undefined_says_why():
    def score(*errors):
        return relative._with_interval(relative._Score(
            lambda rows: corruptions.mean_corruption_error(
                {"fog": 0.5}, {"fog": float(np.array(errors)[rows].mean())}), (len(errors),)))

    assert score(1, 1, 1, 1) == {"value": 0.5, "interval": [0.5, 0.5]}
    rare, never = score(0, 0, 0, 1), score(0, 0, 0, 0)
    assert rare["value"] == 2 and rare["interval"] is None and "In a resample" in rare["why"]
    assert never["value"] is None and "Expected a baseline error above 0 for fog" in never["why"]


def test_sequences_are_drawn_and_refused_in_one_line(official):
    model = linear_model(0, np.zeros((12, 4, 4, 3), np.uint8), np.zeros(12, np.int32))
    settings = FlipSettings(str(official / "p"), ("tilt",), limit=5)
    facts = measure(FLIPS, model, settings, official, "mine")
    assert facts["num_images"] == 5
    assert facts["subset"] == ("5 of 12 sequences, drawn at random with seed 0, of the files "
                               f"{official / 'p'}")
    np.save(official / "p" / "scale.npy", np.zeros((11, 2, 4, 4, 3), np.uint8))
    np.save(official / "p" / "rotate.npy", np.zeros((12, 2, 8, 8, 3), np.uint8))
    for name, expected in (("scale", "Expected 12 sequences in .*, as many as of tilt, got 11"),
                           ("rotate", r"Expected images \[4, 4, 3\] as of mine"),
                           ("tilted", "Did you mean 'tilt'")):
        with pytest.raises(InputError, match=expected):
            measure(FLIPS, model, dataclasses.replace(settings, names=("tilt", name)), official,
                    "mine", "bad")


def test_an_interval_holds_the_estimate_and_shrinks_with_the_images():
    random = np.random.default_rng(1)
    values = random.uniform(size=4000)
    _, low, high = estimates.bootstrapped(lambda rows: values[rows].mean(), 4000, most=1)
    error = values.std() / np.sqrt(4000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    logits = random.normal(size=(500, 5))
    labels = np.array([random.choice(5, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    value, low, high = estimates.bootstrapped(
        lambda rows: metrics.expected_calibration_error(logits[rows], labels[rows]), 500)
    assert low <= value <= high


def test_a_function_of_a_module_that_changed_has_other_results(modules, capsys):
    again = ("evaluate", "plain_user:brightness", "--data", "digits", "--limit", 20,
             "--noise-levels", 0)
    assert call(*again) == 0
    path = pathlib.Path("plain_user.py")
    path.write_text(path.read_text() + "\n# Other.\n")
    capsys.readouterr()
    assert call(*again) == 2
    assert "holds another configuration (see model.json there)" in one_line(capsys)
