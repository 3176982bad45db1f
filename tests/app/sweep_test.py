"""The command ``sweep``, end to end on tiny networks, and how its numbers are chosen and drawn."""

import dataclasses
import itertools
import pathlib
import re
import shutil
import statistics

import numpy as np
import pytest
from command_line import call, metrics_of, one_line

from jaxrobust import data
from jaxrobust.app import config, files, run_folder, trainer
from jaxrobust.app.execution import Feed
from jaxrobust.app.recipe import RECIPES, get_recipe
from jaxrobust.app.report import sweep_section
from jaxrobust.app.study import run, sweep
from jaxrobust.app.study.plan import claim_study, plan_study
from jaxrobust.app.study.read import load_study
from jaxrobust.methods import METHODS
from jaxrobust.parallel import make_layout

# TensorBoard's writer and Orbax warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

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


@pytest.mark.slow
def test_the_values_reach_the_runs(swept):
    assert {path.name for path in swept.iterdir() if path.is_dir()} == {*RUNS, "figures"}
    for name, (lam, std, seed) in RUNS.items():
        there = run_folder.read_config(swept / name)
        assert (there.robust.lam, there.noise_std, there.seed) == (lam, std, seed)
        assert (there.width, there.epochs, there.robust.beta) == (2, 2, 0.05)
        assert files.read_json(swept / name / "provenance.json")["runs_together"] == 8


@pytest.mark.slow
def test_a_run_has_the_result_that_it_has_alone(swept, tmp_path):
    name = "lam=1,noise_std=0.2-seed1"
    trainer.train(run_folder.read_config(swept / name), data.load_dataset("digits"),
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


@pytest.mark.slow
def test_the_report_holds_the_numbers_of_the_runs_and_marks_the_best(swept):
    written = (swept / "report.md").read_text()
    settings = list(itertools.product(LAMS, STDS))
    best = max(recomputed(swept, *setting)[0][0] for setting in settings)
    for lam, std in settings:
        (mean, deviation), *_ = recomputed(swept, lam, std)
        cell = f"{mean:.2f} ± {deviation:.2f}"
        cell = f"**{cell}**" if mean == pytest.approx(best) else cell
        assert f"| {lam:g} | {std:g} | 2 | {cell} |" in written
    assert "Best by validation accuracy: " in written and "figures/sweep.png" in written
    there = files.read_json(swept / "study.json")
    assert there["swept"] == {"robust.lam": list(LAMS), "noise_std": list(STDS)}
    assert there["seeds"] == list(SEEDS) and there["name"] == "sweep-digits-robust"


@pytest.mark.slow
def test_settings_are_drawn_one_below_the_other_with_the_best_apart(swept):
    picture, = sweep_section.section(load_study(swept)).pictures
    ax, = picture.figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        f"lam={lam:g},noise_std={std:g}" for lam, std in itertools.product(LAMS, STDS)]
    drawn = sorted((round(place), mean) for container in ax.containers
                   for mean, place in container.lines[0].get_xydata())
    expected = [recomputed(swept, lam, std)[0][0] for lam, std in itertools.product(LAMS, STDS)]
    assert [mean for _, mean in drawn] == pytest.approx(expected)
    best = ax.containers[0].lines[0].get_xdata()
    assert list(best) == pytest.approx([max(expected)] * len(best)) and len(best)


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_another_sweep_is_refused(swept, capsys):
    before = contents(swept, RUNS)
    assert sweep_digits(swept, *ASKED) == 0
    # Fewer values are part of it, and do not make it smaller.
    assert sweep_digits(swept, "--over", "noise_std=0.2", "--over", "robust.lam=1") == 0
    assert contents(swept, RUNS) == before
    assert files.read_json(swept / "study.json")["swept"]["robust.lam"] == list(LAMS)
    capsys.readouterr()
    for changes, said in ((("--over", "robust.lam=1"), "holds another study"),
                          ((*ASKED, "--num-features", "5"), "holds another configuration")):
        assert sweep_digits(swept, *changes) == 2
        assert said in one_line(capsys)
    assert contents(swept, RUNS) == before


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


@pytest.mark.slow
def test_a_broken_off_sweep_goes_on_to_the_same_results(swept, extended):
    for seed in SEEDS:
        name = f"lam=0.1,noise_std=0.05-seed{seed}"
        for left, right in zip(metrics_of(extended / name), metrics_of(swept / name), strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    # Of two equal networks up to rounding, all but a few images are classified alike.
    for old, new in zip(recomputed(swept, 0.1, 0.05), recomputed(extended, 0.1, 0.05), strict=True):
        assert new[0] == pytest.approx(old[0], abs=0.5)


@pytest.mark.slow
def test_diverged_runs_are_shown_and_the_others_go_on(extended, capsys):
    gone = [f"lam=1e+38,noise_std={std:g}-seed{seed}" for std in STDS for seed in SEEDS]
    message = files.read_json(extended / gone[0] / "diverged.json")["message"]
    assert "has diverged" in message and gone[0] in message
    assert files.read_json(extended / "study.json")["swept"] == {
        "robust.lam": [*LAMS, 1e38], "noise_std": list(STDS)}
    written = (extended / "report.md").read_text()
    assert "| 1e+38 | 0.05 | 0 | diverged (2 diverged) |" in written
    assert "| 1 | 0.05 | 2 |" in written
    # They stay as they are, and the command says so again.
    before = contents(extended, gone)
    assert sweep_digits(extended, *ASKED) == 2
    assert capsys.readouterr().err.count("has diverged") >= 4
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
    ("robust", ("--over", "robust.lam=1", "--seeds"),
     "Expected at least one seed in seeds, got none."),
    ("robust", ("--over", "robust.lam=1", "--seeds", "0", "--seed", "1"),
     "Expected --seeds or --seed, got both."),
    ("robust", ("--over", "robust.lam=1", "--at-once", "0"), "Expected at_once=0 in [1, inf)."),
    ("robust", ("--over", "robust.lam=1,2", "--at-once", "2", "--input", "stream"),
     "Expected input='resident' for 2 runs together, got 'stream'."),
    ("robust", ("--over", "stability_weight=1"), "method 'robust' uses, got 'stability_weight'"),
    ("both", ("--over", "robust.lam=1"), "the method 'both' uses, got 'robust.lam', which belongs "
                                         "to: robust, robust_both."),
    ("normal", ("--over", "noise_std=0.1"), "the method 'normal' uses, got 'noise_std', which "
                                            "belongs to: noisy, both, stability, robust, "),
    ("robst", ("--over", "robust.lam=1"), "Unknown row 'robst'. Did you mean 'robust'?"),
])
def test_bad_input_is_one_line_and_status_2(row, arguments, expected, capsys, tmp_path):
    assert call("sweep", f"digits/{row}", *arguments, "--out", tmp_path / "out") == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.iterdir())


def plan_of(folder, *over, seeds=(0, 1), **changes):
    recipe = get_recipe("digits")
    changed = dataclasses.replace(recipe.run("robust", 0), **changes)
    return sweep.plan_sweep(recipe, "robust", changed, over, seeds, folder)


def test_seeds_and_values_are_added_in_the_order_that_folders_are_named_by(tmp_path):
    claim_study(plan_of(tmp_path, "robust.lam=1", "noise_std=0.1"), ())
    plan = plan_of(tmp_path, "noise_std=0.05", "robust.lam=2", seeds=(7,))
    claim_study(plan, ())
    assert plan.recipe.swept == {"robust.lam": (1, 2), "noise_std": (0.05, 0.1)}
    assert plan.seeds == (0, 1, 7) and len(plan.configs()) == 12
    assert plan_of(tmp_path, "robust.lam=1", "noise_std=0.1") == plan


def test_folders_are_safe_and_all_different(tmp_path):
    plan = plan_of(tmp_path, "robust.lam=1e-7,0.1,0.10000001,3", "noise_std=0,0.06")
    names = [place.name for place in plan.configs()]
    assert len(set(names)) == 16 and all(re.fullmatch(r"[\w.,=+-]+", name) for name in names)
    assert "lam=1e-07,noise_std=0-seed0" in names
    assert "lam=0.10000001,noise_std=0.06-seed1" in names
    # The last parts of the settings' names are enough, since a sweep is over those of one method.
    assert set(sweep.USERS) == set(config.SWEPT)
    for method in METHODS:
        short = [name.rpartition(".")[2] for name, users in sweep.USERS.items() if method in users]
        assert len(set(short)) == len(short)


def test_runs_are_one_by_one_on_cpus_and_together_on_accelerators(tmp_path, monkeypatch):
    digits, layout = data.load_dataset("digits"), make_layout("jit")
    configs = list(plan_of(tmp_path, "robust.lam=1,2,3").configs().values())
    assert run._choose_at_once(None, configs, digits, layout, Feed()) == 1
    assert run._choose_at_once(4, configs, digits, layout, Feed()) == 4
    monkeypatch.setattr(run.jax, "default_backend", lambda: "gpu")
    assert run._choose_at_once(None, configs, digits, layout, Feed()) == 6
    assert run._choose_at_once(None, configs, digits, layout, Feed(input="stream")) == 1


def test_together_are_the_runs_that_one_program_trains():
    recipe = get_recipe("digits")
    configs = plan_study(recipe, pathlib.Path("x"), ["normal", "both"], [0, 1, 2]).configs()
    names = [[place.name for place in group] for group in run._groups(configs, 2)]
    assert names == [["normal-seed0", "normal-seed1"], ["normal-seed2"],
                     ["both-seed0", "both-seed1"], ["both-seed2"]]
    # One after the other they go seed by seed.
    assert [list(group) for group in run._groups(configs, 1)] == [[place] for place in configs]


def settings_of(means, diverged):
    """Three seeds of each setting, some of which diverged."""
    return [sweep_section.Setting(
        {"robust.lam": float(index)}, 3 - number, number, None if number == 3 else mean, 0.5)
        for index, (mean, number) in enumerate(zip(means, diverged, strict=True))]


@pytest.mark.parametrize("means, diverged, expected", [
    ((50, 70, 60), (0, 0, 0), [1]),
    ((70, 70, 60), (0, 0, 0), [0, 1]),
    ((50, 70, 60), (0, 1, 0), [2]),
    ((50, 70, 60), (0, 1, 3), [0]),
    ((50, 70, 60), (1, 1, 1), []),
], ids=["highest", "equal", "some diverged", "all diverged", "none whole"])
def test_the_best_is_chosen_among_whole_settings(means, diverged, expected):
    assert sweep_section.best_settings(settings_of(means, diverged)) == expected


def test_a_setting_of_which_all_runs_diverged_is_a_gap_and_the_table_says_so():
    settings = settings_of((50, 60, 70, 80), (0, 1, 3, 0))
    ax, = sweep_section._picture(settings, [3]).figure.axes
    best, others = (container.lines[0].get_xdata() for container in ax.containers)
    np.testing.assert_array_equal(best, [80])
    np.testing.assert_array_equal(others, [50, 60, np.nan])
    assert [setting.text for setting in settings] == [
        "50.00 ± 0.50", "60.00 ± 0.50 (1 diverged)", "diverged (3 diverged)", "80.00 ± 0.50"]
