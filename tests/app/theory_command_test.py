"""The command ``theory`` on a tiny run, and its section of the report."""

import dataclasses
import html
import itertools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import studies
from command_line import call

from jaxrobust import data, models
from jaxrobust.app import files, run_folder, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import accuracy, theory
from jaxrobust.app.measurements.runner import measure
from jaxrobust.app.measurements.theory import checks
from jaxrobust.app.report import report
from jaxrobust.app.study.plan import claim_study, place_of, plan_study
from jaxrobust.theory import jensen_shannon_sharp_bound

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

RECIPE = dataclasses.replace(studies.RECIPE, rows={"robust": studies.TINY})
SETTINGS = theory.TheorySettings(num_images=10, num_draws=4, smoothed_draws=8, test_size=100,
                                 train_size=100, radii=(0.5, 1.0, 4.0))
WORDS = ("--num-images", "10", "--num-draws", "4", "--smoothed-draws", "8", "--test-size", "100",
         "--train-size", "100", "--radii", "0.5", "1.0", "4.0")


@pytest.fixture(name="study", scope="module")
def _study(tmp_path_factory, shared_study):
    folder = tmp_path_factory.mktemp("study")
    claim_study(plan_study(RECIPE, folder, seeds=[0]), data.load_dataset("digits").class_names)
    shutil.copytree(shared_study / "robust-seed0", place_of(folder, "robust", 0))
    return folder


@pytest.fixture(name="checked", scope="module")
def _checked(study):
    # The second time, what is there is read.
    assert call("theory", study / "robust-seed0", study / "robust-seed0", *WORDS) == 0
    return study


@pytest.mark.slow
def test_the_command_writes_columns_and_facts_and_prints_the_table(checked, capsys):
    facts = files.read_json(checked / "robust-seed0" / "theory.json")
    assert facts["settings"]["num_images"] == 10 and facts["provenance"]["commit"]
    assert facts["num_test_images"] == 100 and facts["num_train_images"] == 100
    with np.load(checked / "robust-seed0" / "theory.npz") as columns:
        assert {values.shape for values in columns.values()} == {(10,)}
        assert np.all(columns["hessian"] >= 0) and np.all(columns["upper_bound_median"] >= 0)
        # What holds whatever the network: Steps 2 to 6 of Appendix E.
        sigma = facts["sigma"]
        for name in ("run", "median"):
            assert np.all(2 / sigma**4 * columns["squared_change"]
                          <= columns[f"upper_bound_{name}"] * 1.001)
    # What is there is not measured again, and printed all the same.
    before = (checked / "robust-seed0" / "theory.json").stat().st_mtime_ns
    assert call("theory", checked / "robust-seed0", *WORDS) == 0
    assert (checked / "robust-seed0" / "theory.json").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    for line in facts["claims"]:
        assert line["claim"] in said and line["measured"] in said


@pytest.mark.slow
def test_facts_that_hold_on_any_network(checked):
    facts = files.read_json(checked / "robust-seed0" / "theory.json")
    claims = {line["key"]: line for line in facts["claims"]}
    for key in ("prop53", "cor51", "thm61_upper_pointwise_run"):
        assert claims[key]["holds"] == 1, key
    # None where every feature is within delta_v: no hinge is active then.
    assert claims["a1"]["holds"] in (1, None)
    assert facts["rescaling"]["same_predictions"] == [1, 1, 1]
    mapping = {name: np.array(facts["mapping"][name]) for name in (
        "error", "theorem", "held_out", "held_out_around", "fixed_centre")}
    assert {values.shape for values in mapping.values()} == {(10, 3)}
    assert np.all(mapping["error"][mapping["theorem"] < 1] == 0)
    separation = facts["separation"]
    assert separation["layers"] == ["block1", "block2", "features"]
    for name in separation["layers"]:
        values = np.array(separation["divergence"][name])
        assert values.shape == (45,) and np.all((values >= 0) & (values <= np.log(2)))
    assert np.all(np.array(separation["pair_bound"]) <= np.array(separation["pair_sharp_bound"])
                  + 1e-6)


@pytest.mark.slow
def test_the_sides_of_the_hyperplanes_are_those_of_a_loop_over_the_test_images(checked):
    folder = checked / "robust-seed0"
    run = trainer.load_run(folder, run_folder.read_config(folder), data.load_dataset("digits"))
    kernel, bias = (np.asarray(part) for part in models.head_parameters(run.state.params))
    test = checks.layers_of(run, accuracy.make_test_split(run.dataset, SETTINGS.test_size))
    facts = files.read_json(folder / "theory.json")["separation"]
    for (a, b), sides, bound in zip(
            facts["pairs"], facts["pair_sides"], facts["pair_decision_bound"], strict=True):
        plane, offset = kernel[:, a] - kernel[:, b], bias[a] - bias[b]
        expected = [np.mean([feature @ plane + offset > 0 for feature in
                             np.asarray(test.features)[np.asarray(test.labels) == label]])
                    for label in (a, b)]
        np.testing.assert_allclose(sides, expected)
        assert 0 <= bound <= np.log(2) + 1e-6
        # No less than if both classes were on their side as seldom as the one that is so less.
        worst = min(sides[0], 1 - sides[1])
        assert bound >= jensen_shannon_sharp_bound(jnp.float32(worst)) - 1e-6


@pytest.mark.slow
def test_geometry_is_that_of_all_pairs_of_training_images(checked):
    digits = data.load_dataset("digits")
    folder = checked / "robust-seed0"
    run = trainer.load_run(folder, run_folder.read_config(folder), digits)
    split = theory.training_images(run, 100)
    layers = checks.layers_of(run, split)
    features, labels = np.asarray(layers.features, np.float64), np.asarray(layers.labels)
    within, between = np.zeros(10), np.inf
    for (a, i), (b, j) in itertools.combinations(zip(features, labels, strict=True), 2):
        distance = np.linalg.norm(a - b)
        if i == j:
            within[i] = max(within[i], distance)
        else:
            between = min(between, distance)
    facts = files.read_json(folder / "theory.json")["geometry"]
    np.testing.assert_allclose(facts["train_dispersion"], within, rtol=1e-4)
    np.testing.assert_allclose(facts["train_smallest_distance_between_classes"], between, rtol=1e-3)


@pytest.mark.parametrize("changed, named", [
    ({"num_draws": 1}, "num_draws=1"), ({"smoothed_draws": 4}, "smoothed_draws=4"),
    ({"smoothed_draws": 12}, "smoothed_draws=12"), ({"nus": ()}, "Expected nus"),
    ({"radii": (0.0,)}, "nus and radii=0.0"), ({"rho_shares": (1.0,)}, "rho_shares=1.0"),
    ({"failure_probability": 0.0}, "failure_probability=0.0"),
    ({"centre_share": -1.0}, "centre_share=-1.0")])
def test_settings_out_of_range_are_named(changed, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(SETTINGS, **changed)


@pytest.mark.slow
@pytest.mark.parametrize("changed, named", [
    ({"num_images": 101}, "num_images=101"), ({"test_size": 10}, "test_size=10 to leave 4 images"),
    ({"train_size": 10}, "train_size=10 to leave 2 images")])
def test_too_few_images_are_named(changed, named, checked, tmp_path):
    folder = checked / "robust-seed0"
    run = trainer.load_run(folder, run_folder.read_config(folder), data.load_dataset("digits"))
    with pytest.raises(InputError, match=named):
        measure(theory.THEORY, run, dataclasses.replace(SETTINGS, **changed), tmp_path, "theory")
    silent = run._replace(config=dataclasses.replace(run.config, noise_std=0.0))
    with pytest.raises(InputError, match="noise_std of the run=0"):
        measure(theory.THEORY, silent, SETTINGS, tmp_path, "theory")
    for changed in ({"margin_relative": True}, {"direction": True, "delta_d": 1.0}):
        other = run._replace(config=dataclasses.replace(
            run.config, robust=dataclasses.replace(run.config.robust, **changed)))
        with pytest.raises(InputError, match=f"Expected robust.{next(iter(changed))}=False of "):
            measure(theory.THEORY, other, SETTINGS, tmp_path, "theory")


def test_the_estimated_divergence_of_separated_classes_is_nearly_log_2():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    apart = rng.normal(size=(400, 3)) + 10 * labels[:, None]
    for values, low, high in ((apart, 0.6, np.log(2)), (rng.normal(size=(400, 3)), 0, 0.05)):
        estimates, errors = checks.divergences(values, labels, [(0, 1)])
        assert low <= estimates[0] <= high and np.all(errors < 0.1)


@pytest.mark.slow
def test_the_report_shows_what_was_checked(checked):
    page = report.write_report(checked).read_text(encoding="utf-8")
    assert html.escape("The paper’s theorems, checked") in page
    for name in ("theory_curvature", "theory_mapping", "theory_separation"):
        assert (checked / "figures" / f"{name}.svg").stat().st_size > 0
    text = (checked / "report.md").read_text(encoding="utf-8")
    assert "Eq. 14: residual" in text and "τ at δ\\_v" in text
    # The same study gives the same bytes.
    assert report.write_report(checked).read_text(encoding="utf-8") == page


@pytest.mark.usefixtures("pictures_left_out")
def test_a_study_that_was_not_checked_has_no_section(study, tmp_path):
    for path in study.rglob("*.json"):
        there = tmp_path / path.relative_to(study)
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.name != "theory.json":
            there.write_text(path.read_text())
    assert "theorems, checked" not in report.write_report(tmp_path).read_text(encoding="utf-8")


def test_json_has_no_nan():
    value = {"a": [1.0, float("nan")], "b": (float("inf"), "text", None, True, 2)}
    cleaned = theory.without_nan(value)
    assert cleaned == {"a": [1.0, None], "b": [None, "text", None, True, 2]}
    assert json.loads(json.dumps(cleaned, allow_nan=False)) == cleaned
    assert checks.median_ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])) == 0.5
    assert checks.median_ratio(jnp.ones(1), np.zeros(1)) is None
