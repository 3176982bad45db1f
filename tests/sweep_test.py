"""The command ``sweep``, end to end on tiny networks, and how its numbers are chosen and drawn."""

import csv
import dataclasses
import itertools
import re
import shutil
import statistics

import numpy as np
import pytest
from command_line import call, metrics_of, one_line
from matplotlib.patches import Rectangle

from jaxrobust import data
from jaxrobust.app import config, files, sweep, trainer
from jaxrobust.app.config import InputError
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES, get_recipe
from jaxrobust.app.report import sweep_report
from jaxrobust.parallel import make_layout

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = [pytest.mark.filterwarnings("default"),
              pytest.mark.usefixtures("quick_compilation")]

# One batch an epoch, and so one program to compile. Without a radius and a clip norm a great
# lambda diverges.
TINY = ("--epochs", "2", "--optimizer.warmup-epochs", "0", "--checkpoint-every", "2", "--width",
        "2", "--num-features", "4", "--train-size", "64", "--robust.delta-v", "0",
        "--optimizer.clip-norm", "None", "--no-tensorboard")
LAMS, STDS, SEEDS = (0.1, 1.0), (0.05, 0.2), (0, 1)
# Not in the order in which they are trained and shown.
VALUES = ("--over", "robust.lam=1,0.1", "--over", "noise_std=0.05,0.2")
ASKED = (*VALUES, "--seeds", *map(str, SEEDS))
LEVELS = (0, 32)
RUNS = {f"lam={lam:g},noise_std={std:g}-seed{seed}": (lam, std, seed)
        for lam, std, seed in itertools.product(LAMS, STDS, SEEDS)}


@pytest.fixture(autouse=True, scope="module")
def _small_evaluation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", dataclasses.replace(
            RECIPES["digits"], evaluation=config.Evaluation(
                noise_levels=LEVELS, num_draws=3, test_size=100, tsne_images=20)))
        yield


def sweep_digits(folder, *arguments):
    return call("sweep", "digits/robust", *TINY, "--out", folder, *arguments)


@pytest.fixture(name="swept", scope="module")
def _swept(tmp_path_factory):
    """A sweep of 8 runs in one program."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    assert sweep_digits(folder, *ASKED, "--at-once", "8") == 0
    return folder


def contents(folder, names):
    """Every file of some runs, with its time."""
    return {path: path.stat().st_mtime_ns for name in names
            for path in sorted((folder / name).rglob("*")) if path.is_file()}


def test_the_values_reach_the_runs(swept):
    assert {path.name for path in swept.iterdir() if path.is_dir()} == {*RUNS, "figures"}
    for name, (lam, std, seed) in RUNS.items():
        run = config.read_config(swept / name)
        assert (run.robust.lam, run.noise_std, run.seed) == (lam, std, seed)
        assert (run.width, run.epochs, run.robust.beta) == (2, 2, 0.05)
        assert files.read_json(swept / name / "provenance.json")["runs_together"] == 8


def test_a_run_has_the_result_that_it_has_alone(swept, tmp_path):
    name = "lam=1,noise_std=0.2-seed1"
    trainer.train(config.read_config(swept / name), data.load_dataset("digits"),
                   tmp_path / "alone", tensorboard=False)
    alone, together = metrics_of(tmp_path / "alone"), metrics_of(swept / name)
    assert len(alone) == 2
    for left, right in zip(alone, together, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    # The settings matter, beyond what is forgiven here.
    for other in ("lam=1,noise_std=0.05-seed1", "lam=0.1,noise_std=0.2-seed1"):
        assert metrics_of(swept / other)[0] != pytest.approx(alone[0], rel=1e-4, abs=1e-6)


def recomputed(folder, lam, std):
    """Mean and standard deviation, in per cent, of each measure of a setting."""
    selection, tests = [], []
    for seed in SEEDS:
        place = folder / f"lam={lam:g},noise_std={std:g}-seed{seed}"
        tested = files.read_json(place / "evaluation.json")
        chosen = {row["epoch"]: row for row in files.read_lines(place / "metrics.jsonl")}
        selection.append(chosen[tested["epoch"]]["selection_accuracy"])
        tests.append([np.mean(level["accuracies"]) for level in tested["levels"]])
    samples = [selection, *zip(*tests, strict=True)]
    return [(100 * statistics.mean(values), 100 * statistics.stdev(values)) for values in samples]


def test_the_tables_hold_the_numbers_of_the_runs(swept):
    lines = list(csv.reader((swept / "sweep.csv").read_text().splitlines()))
    written = (swept / "sweep.md").read_text()
    results = files.read_json(swept / "sweep.json")["results"]
    settings = list(itertools.product(LAMS, STDS))
    best = max(recomputed(swept, *setting)[0][0] for setting in settings)
    assert lines[0][:5] == ["robust.lam", "noise_std", "num_finished", "num_diverged", "best"]
    assert len(lines) == 1 + len(settings)
    for (lam, std), line, result in zip(settings, lines[1:], results, strict=True):
        expected = recomputed(swept, lam, std)
        is_best = expected[0][0] == pytest.approx(best)
        assert line[:5] == [f"{lam:g}", f"{std:g}", "2", "0", "yes" if is_best else "no"]
        np.testing.assert_allclose([float(x) for x in line[5:]], np.ravel(expected), atol=1e-4)
        cells = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in expected]
        cells[0] = f"**{cells[0]}**" if is_best else cells[0]
        assert "| " + " | ".join([f"{lam:g}", f"{std:g}", "2", *cells]) + " |" in written
        assert result["values"] == {"robust.lam": lam, "noise_std": std}
        assert result["best"] == is_best
        np.testing.assert_allclose(
            [list(part.values())[-2:] for part in [result["selection"], *result["accuracy"]]],
            expected)
        assert [run["folder"] for run in result["runs"]] == [
            f"lam={lam:g},noise_std={std:g}-seed{seed}" for seed in SEEDS]


def test_a_sweep_says_what_it_is(swept):
    there = files.read_json(swept / "sweep.json")
    assert there["recipe"] == "digits/robust" and there["seeds"] == list(SEEDS)
    assert there["over"] == {"robust.lam": list(LAMS), "noise_std": list(STDS)}
    assert there["run"]["width"] == 2 and "noise_std" not in there["run"]
    assert "lam" not in there["run"]["robust"] and there["run"]["robust"]["beta"] == 0.05
    assert there["evaluation"]["noise_levels"] == list(LEVELS)
    assert there["provenance"]["commit"] and there["provenance"]["versions"]
    together = [run for result in there["results"] for run in result["runs"]]
    assert all(run["runs_together"] == 8 and run["seconds"] > 0 for run in together)
    took = sweep_report.duration(together[0]["seconds"])
    assert f"took {took}, with 8 at once." in (swept / "sweep.md").read_text()


def test_two_settings_are_drawn_as_heat_maps(swept):
    assert "figures/accuracy.png" in (swept / "sweep.md").read_text()
    for ending in ("png", "svg"):
        assert (swept / "figures" / f"accuracy.{ending}").stat().st_size
    plan = sweep.make_plan(get_recipe("digits"), "robust", get_recipe("digits").run("robust", 0),
                           VALUES[1::2], SEEDS)
    outcomes = sweep_report.load_outcomes(swept, plan)
    figure = sweep_report.heat_figure(
        plan, [sweep_report._panel(plan, outcomes, [1], "Clean", {}, "Clean")], shared=False)
    ax = figure.axes[0]
    image = np.asarray(ax.get_images()[0].get_array())
    for (row, lam), (column, std) in itertools.product(enumerate(LAMS), enumerate(STDS)):
        mean, deviation = recomputed(swept, lam, std)[1]
        assert image[row, column] == pytest.approx(mean)
        words, = (text.get_text() for text in ax.texts if text.get_position() == (column, row))
        assert words == f"{mean:.1f}\n±{deviation:.1f}"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0.1", "1"]
    # Its frames are about the second of the settings.
    assert {(round(p.get_x() + p.get_width() / 2), round(p.get_y() + p.get_height() / 2))
            for p in ax.patches if isinstance(p, Rectangle)} == {(1, 0)}


def test_what_is_done_is_not_done_again_and_another_sweep_is_refused(swept, capsys):
    before = contents(swept, RUNS)
    assert sweep_digits(swept, *ASKED) == 0
    # Fewer values are part of it, and do not make it smaller.
    assert sweep_digits(swept, "--over", "noise_std=0.2", "--over", "robust.lam=1") == 0
    assert contents(swept, RUNS) == before
    assert len(files.read_json(swept / "sweep.json")["results"]) == 4
    capsys.readouterr()
    for changes in (("--over", "robust.lam=1"), (*ASKED, "--num-features", "5")):
        assert sweep_digits(swept, *changes) == 2
        assert f"{swept} holds another sweep" in one_line(capsys)
    assert contents(swept, RUNS) == before


def test_a_sweep_from_before_a_choice_is_the_same_sweep(tmp_path):
    recipe = get_recipe("digits")
    run = recipe.run("robust", 0)
    plan = sweep.make_plan(recipe, "robust", run, ("noise_std=0.1,0.2",), None)
    sweep.claim_sweep(tmp_path, plan)
    written = files.read_json(tmp_path / "sweep.json")
    for name in config.BEFORE_CHOICES:
        del written["run"][name]
    files.write_json(tmp_path / "sweep.json", written)
    other = dataclasses.replace(run, batch_norm_statistics="recomputed")
    with pytest.raises(InputError, match="holds another sweep"):
        sweep.claim_sweep(tmp_path, sweep.make_plan(
            recipe, "robust", other, ("noise_std=0.1,0.2",), None))
    assert sweep.claim_sweep(tmp_path, plan) == plan


@pytest.fixture(name="extended", scope="module")
def _extended(swept, tmp_path_factory):
    """The sweep with a run lost, another not tested yet, and a value added that diverges."""
    folder = tmp_path_factory.mktemp("extended") / "out"
    shutil.copytree(swept, folder)
    shutil.rmtree(folder / "lam=0.1,noise_std=0.05-seed0")
    (folder / "lam=0.1,noise_std=0.05-seed1" / "evaluation.json").unlink()
    before = contents(folder, [name for name in RUNS if "lam=0.1,noise_std=0.05" not in name])
    trained = folder / "lam=0.1,noise_std=0.05-seed1" / "metrics.jsonl"
    when = trained.stat().st_mtime_ns
    assert sweep_digits(folder, "--over", "robust.lam=1e38", "--over", "noise_std=0.05",
                        "--at-once", "8") == 2
    assert trained.stat().st_mtime_ns == when
    assert contents(folder, [name for name in RUNS if "lam=0.1,noise_std=0.05" not in name]) == (
        before)
    return folder


def test_a_broken_off_sweep_goes_on_to_the_same_results(swept, extended):
    for seed in SEEDS:
        name = f"lam=0.1,noise_std=0.05-seed{seed}"
        for left, right in zip(metrics_of(extended / name), metrics_of(swept / name), strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    # Of two equal networks up to rounding, all but a few images are classified alike.
    for old, new in zip(recomputed(swept, 0.1, 0.05), recomputed(extended, 0.1, 0.05), strict=True):
        assert new[0] == pytest.approx(old[0], abs=0.5)


def test_diverged_runs_are_shown_and_the_others_go_on(extended, capsys):
    gone = [f"lam=1e+38,noise_std={std:g}-seed{seed}" for std in STDS for seed in SEEDS]
    message = files.read_json(extended / gone[0] / "diverged.json")["message"]
    assert "has diverged" in message and gone[0] in message
    there = files.read_json(extended / "sweep.json")
    assert there["over"] == {"robust.lam": [*LAMS, 1e38], "noise_std": list(STDS)}
    assert [(run["status"], run["folder"]) for result in there["results"][4:]
            for run in result["runs"]] == [("diverged", name) for name in gone]
    assert there["results"][4]["selection"] is None and not there["results"][4]["best"]
    written = (extended / "sweep.md").read_text()
    row = "| 1e+38 | 0.05 | 0 (2 diverged) " + "| diverged " * (1 + len(LEVELS)) + "|"
    assert row in written and "| 1 | 0.05 | 2 |" in written
    line = (extended / "sweep.csv").read_text().splitlines()[5]
    assert line == "1e+38,0.05,0,2,no" + "," * 2 * (1 + len(LEVELS))
    # They stay as they are, and the command says so again.
    before = contents(extended, gone)
    assert sweep_digits(extended, *ASKED) == 2
    assert one_line(capsys) == (
        f"error: 4 of 12 runs in {extended} diverged: {', '.join(gone)}.")
    assert contents(extended, gone) == before


@pytest.mark.parametrize("row, arguments, expected", [
    ("robust", (), "Expected at least one --over SETTING=VALUES"),
    ("robust", ("--over", "robust.lam"), "Expected --over SETTING=VALUES"),
    ("robust", ("--over", "robust.lma=1"), "Unknown setting 'robust.lma'. Did you mean "
                                           "'robust.lam'?"),
    ("robust", ("--over", "epochs=1"), "Unknown setting 'epochs'."),
    ("robust", ("--over", "robust.lam=1,much"), "Expected robust.lam='much' to be a number."),
    ("robust", ("--over", "robust.lam="), "Expected robust.lam='' to be a number."),
    ("robust", ("--over", "robust.lam=1,-1"), "Expected lam=-1.0 in [0, inf)."),
    ("robust", ("--over", "robust.lam=nan"), "Expected lam=nan in [0, inf)."),
    ("robust", ("--over", "robust.momentum=0.5,1"), "Expected momentum=1.0 in [0, 1)."),
    ("robust", ("--over", "robust.lam=1", "--over", "robust.lam=2"),
     "Expected each setting in one --over, got 'robust.lam' in two."),
    ("robust", ("--over", "noise_std=0.5,1,0.50"), "Expected each noise_std once, got 0.5 twice."),
    ("robust", ("--over", "robust.lam=1", "--robust.lam", "2"),
     "Expected robust.lam in --over or by its own option, got both."),
    ("robust", ("--over", "robust.lam=1", "--seeds", "1", "1"), "Expected each seed once, got 1"),
    ("robust", ("--over", "robust.lam=1", "--seeds", "-1"), "Expected seed=-1 in [0, 4294967296)."),
    ("robust", ("--over", "robust.lam=1", "--seeds"), "Expected at least one seed, got none."),
    ("robust", ("--over", "robust.lam=1", "--seeds", "0", "--seed", "1"),
     "Expected --seeds or --seed, got both."),
    ("robust", ("--over", "robust.lam=1", "--at-once", "0"), "Expected at_once=0 in [1, inf)."),
    ("robust", ("--over", "robust.lam=1,2", "--at-once", "2", "--input", "stream"),
     "Expected input='resident' for 2 runs together, got 'stream'."),
    ("robust", ("--over", "robust.lam=1", "--batch-size", "2000"), "Expected batch_size=2000 <= "),
    ("robust", ("--over", "stability_weight=1"), "method 'robust' uses, got 'stability_weight'"),
    ("both", ("--over", "robust.lam=1"), "the method 'both' uses, got 'robust.lam', which is of: "
                                         "robust."),
    ("normal", ("--over", "noise_std=0.1"), "the method 'normal' uses, got 'noise_std', which is "
                                            "of: noisy, both, stability, robust."),
    ("robst", ("--over", "robust.lam=1"), "Unknown row 'robst'. Did you mean 'robust'?"),
])
def test_bad_input_is_one_line_and_status_2(row, arguments, expected, capsys, tmp_path):
    assert call("sweep", f"digits/{row}", *arguments, "--out", tmp_path / "out") == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.iterdir())


def plan_of(*over, seeds=(0, 1), **changes):
    recipe = get_recipe("digits")
    run = dataclasses.replace(recipe.run("robust", 0), **changes)
    return sweep.make_plan(recipe, "robust", run, over, seeds)


def test_a_sweep_leaves_a_folder_with_something_else_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no sweep.json"):
        sweep.claim_sweep(tmp_path, plan_of("noise_std=0.1"))
    assert len(list(tmp_path.iterdir())) == 1


def test_seeds_and_values_are_added_in_the_order_that_folders_are_named_by(tmp_path):
    sweep.claim_sweep(tmp_path, plan_of("robust.lam=1", "noise_std=0.1"))
    plan = sweep.claim_sweep(tmp_path, plan_of("noise_std=0.05", "robust.lam=2", seeds=(7,)))
    assert plan.over == {"robust.lam": (1, 2), "noise_std": (0.05, 0.1)}
    assert plan.seeds == (0, 1, 7) and len(plan.configs()) == 12
    assert sweep.claim_sweep(tmp_path, plan_of("robust.lam=1", "noise_std=0.1")) == plan


def test_folders_are_safe_and_all_different():
    names = list(plan_of("robust.lam=1e-7,0.1,0.10000001,3", "noise_std=0,0.06").configs())
    assert len(set(names)) == 16 and all(re.fullmatch(r"[\w.,=+-]+", name) for name in names)
    assert names[:2] == ["lam=1e-07,noise_std=0-seed0", "lam=1e-07,noise_std=0-seed1"]
    assert "lam=0.10000001,noise_std=0.06-seed1" in names
    # The last parts of the settings' names are enough.
    short = [name.rpartition(".")[2] for name in config.SWEPT]
    assert len(set(short)) == len(short) and set(sweep.USERS) == set(config.SWEPT)


def test_runs_are_one_by_one_on_cpus_unless_asked_for():
    digits, layout = data.load_dataset("digits"), make_layout("jit")
    plan = plan_of("robust.lam=1,2,3")
    assert sweep.choose_at_once(None, plan, digits, layout, Feed()) == 1
    assert sweep.choose_at_once(4, plan, digits, layout, Feed()) == 4


def test_runs_are_all_at_once_on_accelerators_unless_streamed(monkeypatch):
    digits, layout = data.load_dataset("digits"), make_layout("jit")
    plan = plan_of("robust.lam=1,2,3")
    monkeypatch.setattr(sweep.jax, "default_backend", lambda: "gpu")
    assert sweep.choose_at_once(None, plan, digits, layout, Feed()) == 6
    assert sweep.choose_at_once(None, plan, digits, layout, Feed(input="stream")) == 1


def outcomes_of(plan, selection, diverged=()):
    """Made-up results; the accuracy at every noise level is the opposite of the selection."""
    found = []
    for index, (values, mean) in enumerate(zip(plan.settings(), selection, strict=True)):
        number = diverged[index] if diverged else 0
        measures = {title: sweep_report.Spread(
            mean if title == sweep_report.SELECTION else 100 - mean, 0.5)
            for title in sweep_report.titles_of(plan)}
        found.append(sweep_report.Outcome(
            values, (None,) * (len(plan.seeds) - number),
            tuple((seed, "diverged") for seed in plan.seeds[:number]),
            measures if number < len(plan.seeds) else {}))
    return found


@pytest.mark.parametrize("selection, diverged, expected", [
    ((50, 70, 60), (), [1]),
    ((70, 70, 60), (), [0, 1]),
    ((50, 70, 60), (0, 1, 0), [2]),
    ((50, 70, 60), (0, 1, 2), [0]),
    ((50, 70, 60), (1, 1, 1), []),
], ids=["highest", "equal", "some diverged", "all diverged", "none whole"])
def test_the_best_is_chosen_on_validation_images_among_whole_settings(
        selection, diverged, expected):
    plan = plan_of("robust.lam=1,2,3")
    assert sweep_report.best_settings(outcomes_of(plan, selection, diverged)) == expected


@pytest.mark.parametrize("select, words", [("last", "the last epoch"), ("test", "test images")])
def test_without_validation_images_nothing_is_marked(select, words):
    plan = plan_of("robust.lam=1,2,3", select=select)
    outcomes = outcomes_of(plan, (50, 70, 60))
    assert sweep_report.best_settings(outcomes) == []
    assert sweep_report.SELECTION not in sweep_report.titles_of(plan)
    sentence = sweep_report._best_sentence(plan, outcomes)
    assert sentence.startswith("No setting is marked as the best") and words in sentence


def test_one_setting_is_a_line_plot_with_a_gap_where_all_diverged():
    plan = plan_of("robust.lam=0.01,0.1,1,10")
    outcomes = outcomes_of(plan, (50, 60, 70, 80), (0, 0, 2, 1))
    picture, = sweep_report._pictures(plan, outcomes)
    ax, = picture.figure.axes
    assert [text.get_text() for text in ax.texts] == ["diverged"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.01", "0.1", "1", "10"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [50, 60, np.nan, 80])
    assert ax.get_xlabel() == "robust.lam (logarithmic)"


@pytest.mark.parametrize("values, expected, scale", [
    ((0.03, 0.06, 0.1), (0.03, 0.06, 0.1), ""),
    ((0.1, 1.0, 10.0), (-1, 0, 1), " (logarithmic)"),
    ((0.0, 0.9, 0.99, 0.999), (0, 1, 2, 3), " (not to scale)"),
    ((0.5,), (0.5,), ""),
], ids=["linear", "logarithmic", "neither", "single"])
def test_an_axis_keeps_its_labels_apart(values, expected, scale):
    x, words = sweep_report.axis_positions(values)
    np.testing.assert_allclose(x, expected)
    assert words == scale


def test_a_cell_in_which_all_diverged_is_empty_and_hatched():
    plan = plan_of("robust.lam=1,2", "noise_std=0.1,0.2")
    outcomes = outcomes_of(plan, (50, 60, 70, 80), (0, 1, 2, 0))
    picture, = sweep_report._pictures(plan, outcomes)
    panels = picture.figure.axes[:1 + len(LEVELS)]
    assert [ax.get_title() for ax in panels] == sweep_report.titles_of(plan)
    for ax in panels:
        hatched, = (patch for patch in ax.patches if patch.get_hatch())
        assert hatched.get_xy() == (-0.5, 0.5)
        texts = {text.get_position(): text.get_text() for text in ax.texts}
        assert set(texts) == {(0, 0), (1, 0), (1, 1)} and texts[1, 0].endswith("\n1 of 2")
    shown = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert shown == ["best by validation accuracy", "diverged"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("over", [
    ("robust.lam=1,2",), ("robust.lam=1,2", "noise_std=0.1"),
    ("robust.lam=1", "noise_std=0.1", "robust.delta_d=1,2")], ids=["line", "map", "facets"])
def test_a_sweep_of_which_all_diverged_is_shown_too(over, tmp_path):
    plan = plan_of(*over)
    section = sweep_report._section(plan, outcomes_of(plan, (50, 60), (2, 2)))
    assert section.lead.startswith("No setting is marked as the best, for of each a run diverged")
    assert [row.cells[-1].text for row in section.tables[0].rows] == ["diverged"] * 2
    for picture in section.pictures:
        picture.figure.savefig(tmp_path / "figure.svg")


def test_more_settings_are_facets_if_few_and_else_a_table_alone():
    plan = plan_of("robust.lam=1,2", "noise_std=0.1,0.2", "robust.delta_d=1,5")
    outcomes = outcomes_of(plan, range(50, 58))
    pictures = sweep_report._pictures(plan, outcomes)
    assert [picture.name for picture in pictures] == [
        "validation_accuracy", "clean", *(f"{level}_255" for level in LEVELS[1:])]
    left, right = pictures[0].figure.axes[:2]
    assert [ax.get_title() for ax in (left, right)] == ["robust.delta_d=1", "robust.delta_d=5"]
    np.testing.assert_array_equal(left.get_images()[0].get_array(), [[50, 52], [54, 56]])
    np.testing.assert_array_equal(right.get_images()[0].get_array(), [[51, 53], [55, 57]])
    assert left.get_images()[0].norm is right.get_images()[0].norm
    many = plan_of("robust.lam=1,2", "noise_std=0.1,0.2", "robust.delta_d=1,2,3,4,5,6,7")
    assert sweep_report._pictures(many, outcomes_of(many, range(28))) == []
