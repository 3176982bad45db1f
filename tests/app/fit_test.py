"""The command `fit`: its decisions as pure functions, and from a folder to the chosen run."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from command_line import call, one_line
from PIL import Image

from jaxrobust import InputError, data
from jaxrobust.app import run_folder
from jaxrobust.app.fit import choice, settings
from jaxrobust.app.fit import run as fit
from jaxrobust.app.fit.costs import work_of
from jaxrobust.app.fit.schedule import MOST_SEEDS, RESERVE, Costs, Work, plan_schedule, seconds_of
from jaxrobust.app.measurements.held_out import HeldOutSettings
from jaxrobust.app.study.read import load_study
from jaxrobust.parallel import make_layout

# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "std"), [
    ("40/255", 40 / 255), ("15.3/255", 0.06), ("0.157", 0.157), (" 1 / 2 ", 0.5)])
def test_noise_is_read_as_a_number_or_a_fraction(text, std):
    assert settings.parse_noise(text) == pytest.approx(std)


@pytest.mark.parametrize(("text", "problem"), [
    ("40", "Did you mean 40/255"), ("0", "in \\[0.25/255, 1\\]"), ("nan", "in \\["),
    ("much", "as a number"), ("1/0", "as a number"), ("-0.1", "in \\[")])
def test_noise_that_makes_no_sense_is_refused(text, problem):
    with pytest.raises(InputError, match=problem):
        settings.parse_noise(text)


@pytest.mark.parametrize(("text", "seconds"), [
    ("90s", 90), ("6m", 360), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("2", 7200),
    ("10min", 600), ("1d", 86400)])
def test_a_budget_is_read_in_seconds(text, seconds):
    assert settings.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "h2", "2h!", "-1h", "0", "0s", "nan"])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(InputError, match="budget="):
        settings.parse_budget(text)


@pytest.mark.parametrize(("size", "side", "reduced"), [
    ((3000, 4000), 64, (64, 85)), ((50, 50), 64, (50, 50)), ((400, 100), 64, (256, 64))])
def test_photographs_are_reduced_in_proportion_and_never_enlarged(size, side, reduced):
    assert settings.reduced_size(size, side) == reduced


PHOTOGRAPHS = settings.Facts("folder:x", 900, accelerator=False, stored_size=(900, 1200))


def test_settings_follow_from_the_data_and_the_machine():
    config, reasons = settings.choose_settings(PHOTOGRAPHS, {})
    assert (config.image_size, config.model, config.method) == (
        (64, 85), "mobilenet_v3_small", "both")
    assert config.epochs == pytest.approx(70, abs=20)
    larger = dataclasses.replace(PHOTOGRAPHS, accelerator=True, num_images=10**6)
    config, _ = settings.choose_settings(larger, {})
    assert config.image_size == (128, 171) and config.epochs == 10
    tiny = dataclasses.replace(PHOTOGRAPHS, stored_size=(32, 40))
    assert settings.choose_settings(tiny, {})[0].model == "resnet18"
    on_cpu, on_gpu = (settings.choose_settings(settings.Facts("cifar10", 0, accelerator), {})[0]
                      for accelerator in (False, True))
    assert (on_cpu.width, on_gpu.width, on_gpu.dtype) == (8, 64, "bfloat16")
    assert {one.name for one in settings.decisions_of(config, reasons, PHOTOGRAPHS, 9)} == {
        "image size", "model", "precision", "batch size", "optimizer", "held out"}


@pytest.mark.parametrize(("asked", "left"), [
    ({"batch_size": 16}, 788), ({"batch_size": 64}, 788), ({"validation_size": 500}, 400),
    ({"validation_size": 0.5, "batch_size": 8}, 450)])
def test_photographs_get_as_many_updates_whatever_the_batches(asked, left):
    config, _ = settings.choose_settings(PHOTOGRAPHS, asked)
    assert 10 <= config.epochs <= 100
    if config.epochs < 100:
        updates = config.epochs * left / config.batch_size
        assert settings.UPDATES <= updates < settings.UPDATES + left / config.batch_size + 1


def pictures(number, validation=0):
    labels = (np.arange(number) % 2).astype(np.int32)
    train = data.Split(np.zeros((number, 4, 4, 3), np.uint8), labels)
    held_out = data.Split(train.images[:validation], labels[:validation]) if validation else None
    return data.Dataset("few", train, train, ("a", "b"), (0.5,) * 3, (0.2,) * 3, False,
                        validation=held_out)


def test_what_the_images_and_the_devices_change_is_what_the_decisions_say():
    config, reasons = settings.choose_settings(PHOTOGRAPHS, {"image_size": (4, 4)})
    alone, eight = (make_layout(form) for form in ("jit", "mesh"))
    few, told, lines = settings.fitted_to(config, reasons, pictures(20), alone)
    assert few.batch_size == 18 and told["batch_size"] == "32 is too many for these images"
    assert lines and reasons["batch_size"] == "the recipe photos"
    split, told, _ = settings.fitted_to(config, reasons, pictures(20), eight)
    assert split.batch_size == 16 and told["batch_size"] == "a multiple of the 8 devices"
    _, told, _ = settings.fitted_to(config, reasons, pictures(100, validation=10), alone)
    assert told["validation_size"] == "those of the data set"
    asked, given = settings.choose_settings(PHOTOGRAPHS, {"batch_size": 30, "image_size": (4, 4)})
    whole, told, _ = settings.fitted_to(asked, given, pictures(100), eight)
    assert (whole.batch_size, told["batch_size"]) == (30, "as asked")


def test_the_budget_counts_the_validations_that_a_run_makes():
    config, _ = settings.choose_settings(PHOTOGRAPHS, {"image_size": (4, 4)})
    dataset = pictures(100)
    works = [work_of(settings.trained_for(config, epochs), dataset, 1, 1) for epochs in (5, 50)]
    assert works[0] == works[1]


def test_every_decision_can_be_overridden_and_says_so():
    asked = {"image_size": (40, 30), "model": "small_cnn", "width": 4, "batch_size": 8, "epochs": 2,
             "optimizer.learning_rate": 0.5, "validation_size": 0.3, "dtype": "bfloat16"}
    config, reasons = settings.choose_settings(PHOTOGRAPHS, asked)
    assert (config.image_size, config.model, config.width, config.batch_size, config.epochs) == (
        (40, 30), "small_cnn", 4, 8, 2)
    assert (config.optimizer.learning_rate, config.validation_size, config.dtype) == (
        0.5, 0.3, "bfloat16")
    assert set(reasons.values()) == {"as asked"}


@pytest.mark.parametrize("epochs", [1, 4, 5, 11, 70, 200])
def test_a_schedule_of_any_length_keeps_its_shape_and_saves_five_times(epochs):
    config, _ = settings.choose_settings(PHOTOGRAPHS, {})
    changed = settings.trained_for(config, epochs)
    assert changed.optimizer.warmup_epochs / epochs == pytest.approx(
        config.optimizer.warmup_epochs / config.epochs)
    assert -(-epochs // changed.checkpoint_every) <= 5


def test_the_methods_differ_in_nothing_else():
    config = dataclasses.replace(settings.choose_settings(PHOTOGRAPHS, {})[0], noise_std=0.1)
    rows = settings.rows_of_methods(config)
    assert set(rows) == set(settings.ORDER) == set(settings.LABELS)
    assert rows["half_noise"].perturb == "sometimes_gaussian(0.1, 1/2)"
    assert {dataclasses.replace(one, method="both", perturb=None) for one in rows.values()} == {
        config}


# --- the budget ------------------------------------------------------------------------------

RELATIVE = {"both": 2.0, "normal": 1.0, "half_noise": 1.0, "robust_both": 2.0}
COSTS, WORK = Costs(compile=10.0, pass_per_image=0.001), Work(trained=1000, forward=5000)


def schedule_in(budget, **options):
    return plan_schedule(settings.ORDER, RELATIVE, COSTS, WORK, budget, wanted_epochs=40, **options)


def test_time_is_that_of_compiling_training_and_testing():
    # 3 passes for normal and 6 for both, of 1000 images in each of 4 epochs.
    assert seconds_of(("both", "normal"), 4, 2, RELATIVE, COSTS, WORK) == pytest.approx(
        2 * 10 + 2 * (4 * 9 + 10))


def test_a_larger_budget_never_means_less_and_nothing_exceeds_it():
    before = None
    for budget in np.geomspace(30, 10_000, 60):
        found = schedule_in(budget)
        assert found.seconds <= (1 - RESERVE) * budget
        assert found.rows == settings.ORDER[: len(found.rows)]
        assert bool(found.notes) == (
            len(found.rows) < 4 or found.epochs < 40 or len(found.seeds) < MOST_SEEDS)
        if before is not None:
            assert len(found.rows) >= len(before.rows) and len(found.seeds) >= len(before.seeds)
            assert found.epochs >= before.epochs or len(found.rows) > len(before.rows)
        before = found
    assert (len(before.rows), before.epochs, len(before.seeds)) == (4, 40, MOST_SEEDS)


def test_what_is_left_out_is_named():
    assert schedule_in(30).notes == (
        "Left out for the budget of 30 s: method normal, method half_noise, method robust_both, "
        "38 of 40 epochs, 2 of 3 seeds.",)


def test_options_are_kept_also_beyond_the_budget():
    found = schedule_in(60, rows=("normal", "robust_both"), epochs=100, seeds=(5, 6))
    assert (found.rows, found.epochs, found.seeds) == (("normal", "robust_both"), 100, (5, 6))
    assert any("longer than the budget" in note for note in found.notes)
    assert len(schedule_in(10_000, epochs=3).seeds) == MOST_SEEDS


def test_time_that_is_spent_is_not_planned_again():
    assert schedule_in(300, spent=100).seconds <= 0.9 * 300 - 100


def test_a_budget_below_one_epoch_is_refused_with_what_is_needed():
    with pytest.raises(InputError, match=r"budget=10 s to be at least \d+ s"):
        schedule_in(10)


# --- the choice ------------------------------------------------------------------------------


def scored(row, seed, clean, noisy):
    return choice.Scored(row, seed, pathlib.Path(f"{row}-seed{seed}"), np.array(clean, float),
                         np.array(noisy, float))


RUNS = [scored("normal", 0, [1, 1, 1, 1], [0, 0, 0, 0]), scored("both", 0, [1, 1, 0, 0],
                                                                [1, 1, 0, 0.4]),
        scored("normal", 1, [1, 1, 1, 0], [0, 0, 0, 0]), scored("both", 1, [1, 1, 1, 0],
                                                                [1, 1, 0.2, 0])]


@pytest.mark.parametrize(("share", "row", "seed"), [(1.0, "normal", 0), (0.5, "both", 1),
                                                    (0.0, "both", 0)])
def test_the_method_of_best_mean_is_chosen_and_its_best_seed(share, row, seed):
    found = choice.choose(RUNS, share)
    assert (found.run.row, found.run.seed) == (row, seed)
    assert list(found.scores) == sorted(found.scores, key=lambda row: -found.scores[row])
    for order in itertools.permutations(RUNS):
        assert choice.choose(order, share).run.folder == found.run.folder


def test_a_difference_is_clear_only_with_enough_images():
    def chosen(number, disagreeing):
        good, poor = np.ones(number), np.ones(number)
        poor[:disagreeing] = 0
        return choice.choose([scored("both", 0, good, good), scored("normal", 0, poor, poor)], 0.5)

    one, = chosen(100, 2).others
    assert one.difference == pytest.approx(0.02) and not one.clear and one.seeds is None
    one, = chosen(100, 10).others  # Over the images it is, but of one training each.
    assert one.difference > one.half and not one.clear
    words = fit.choice_lines(chosen(100, 10), 0.5, 0.1)[-1]
    assert "images, one training each): another training may differ" in words
    alone = [scored(row, seed, np.full(100, value), np.full(100, value))
             for row, value in (("both", 1), ("normal", 0)) for seed in range(3)]
    assert choice.choose(alone, 0.5).others[0].clear
    alike = choice.choose([scored("both", 0, [1, 1], [1, 1]), scored("normal", 0, [1, 1], [1, 1])],
                          0.5)
    assert alike.run.row == "both" and not alike.others[0].clear


def test_seeds_that_differ_widen_the_interval():
    one, = choice.choose(RUNS, 0.5).others
    assert one.seeds > 0 and one.half > one.images


# --- the command -----------------------------------------------------------------------------


def write(folder, number, side=24, seed=0, contrast=60):
    """Photographs of two classes, bright at the top or at the bottom, with flat areas."""
    random = np.random.default_rng(seed)
    for label, sign in (("rain", 1), ("shine", -1)):
        (folder / label).mkdir(parents=True)
        for index in range(number):
            image = np.full((side, side, 3), 128.0) + random.uniform(-20, 20, (1, 1, 3))
            image[: side // 2] += sign * contrast
            image += random.normal(0, 2, image.shape)
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
                folder / label / f"{index}.png")
    return folder


TINY = ("--model", "small_cnn", "--width", "2", "--epochs", "2", "--batch-size", "8", "--num-draws",
        "2")


@pytest.fixture(name="fitted", scope="module")
def _fitted(tmp_path_factory):
    """A finished fit on a folder, with all its options."""
    place = tmp_path_factory.mktemp("fit")
    write(place / "photos", 20)
    words = ["fit", f"folder:{place / 'photos'}", "--noise", "40/255", "--methods", "both",
             "normal", "--seeds", "0,1", *TINY, "--data-dir", place / "data", "--out",
             place / "out", "--budget", "1h"]
    assert call(*words) == 0
    return place, words


@pytest.mark.slow
def test_a_fit_ends_with_the_run_its_card_and_what_to_do_next(fitted, capsys, pictures_left_out):
    place, words = fitted
    chosen = run_folder.read_facts(place / "out", "choice")
    run = pathlib.Path(chosen["run"])
    assert run.parent == place / "out" / "study" and run_folder.is_done(run)
    assert (run / "card.html").is_file() and (run.parent / "report.html").is_file()
    text = chosen["text"]
    for part in (f"Chosen: {chosen['row']}, seed {chosen['seed']}", "8 test images", "clean",
                 "under 40/255", "(95 % over images and trainings)",
                 f"jaxrobust predict {run} IMAGE", f"jaxrobust export {run}"):
        assert part in text, (part, text)
    assert len(load_study(run.parent).all_finished()) == 4
    held_out = run_folder.read_facts(run, "held_out")
    assert held_out["split"] == "validation" and held_out["num_images"] == 4
    scores = [held_out["clean"], held_out["noisy"]]
    assert 0 <= min(scores) <= max(scores) <= 1
    # Another time, there is nothing to train, and the same is chosen.
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("metrics.jsonl")}
    assert call(*words) == 0
    said = capsys.readouterr().out
    assert text in said and "Resuming the fit" in said and "Timing" not in said
    assert before == {path: path.stat().st_mtime_ns for path in run.parent.rglob("metrics.jsonl")}


@pytest.mark.slow
def test_other_options_need_another_folder(fitted, capsys):
    _, words = fitted
    assert call(*words, "--clean-share", "0.9") == 2
    assert "holds another fit (see fit.json there)" in one_line(capsys)


@pytest.mark.slow
def test_a_plan_reads_back_as_it_was_written(fitted):
    place, _ = fitted
    facts = run_folder.read_facts(place / "out", "fit")
    asked = fit.Asked(**facts["asked"])
    plan = fit.read_plan(place / "out", asked)
    assert json.loads(json.dumps(dataclasses.asdict(plan))) == {
        name: facts[name] for name in ("rows", "seeds", "noise_std", "seconds", "text")}
    assert list(plan.rows) == ["both", "normal"] and plan.seeds == (0, 1)
    for option in ("--noise", "--image-size", "--model", "--batch-size", "--learning-rate",
                   "--methods", "--epochs", "--seeds", "--clean-share", "--budget", "--dtype"):
        assert option in plan.text


@pytest.mark.slow
def test_the_noise_of_a_folder_is_measured_at_the_size_of_training(fitted, capsys, tmp_path):
    place, _ = fitted
    for path in sorted((place / "photos").rglob("*.png")):
        image = np.asarray(Image.open(path))
        noise = 20 * np.random.default_rng(len(path.name)).standard_normal(image.shape)
        there = tmp_path / "camera" / path.parent.name / path.name
        there.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)).save(there)
    words = ("fit", f"folder:{place / 'photos'}", *TINY, "--data-dir", place / "data", "--out",
             tmp_path / "out", "--dry-run")
    assert call(*words, "--like", tmp_path / "camera") == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  noise"))
    assert float(line.split()[1].split("/")[0]) == pytest.approx(20, abs=2)
    assert "in 40 images of" in line and "in the training images" in line
    assert not (tmp_path / "out").exists()
    assert call(*words, "--like", place / "photos") == 2
    assert "noisier images than the training images" in one_line(capsys)


@pytest.mark.slow
def test_pairs_of_shots_are_preferred_and_nothing_is_subtracted(fitted, tmp_path):
    place, _ = fitted
    dataset = data.load_folder(place / "photos", cache_dir=place / "data" / "image_folders",
                               image_size=(24, 24))
    random = np.random.default_rng(0)
    for scene in range(6):
        rough = random.integers(60, 190, (24, 24, 3))
        for shot in "ab":
            noisy = np.clip(np.rint(rough + 15 * random.standard_normal(rough.shape)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / f"{scene}_{shot}.png")
    std, why = fit.camera_noise(tmp_path, dataset)
    assert 255 * std == pytest.approx(15, abs=1.5) and "of 6 pairs of shots" in why
    assert 255 * std == pytest.approx(round(255 * std, 1))


@pytest.mark.slow
def test_a_study_without_a_finished_run_chooses_nothing(fitted, tmp_path):
    place, _ = fitted
    facts = run_folder.read_facts(place / "out", "fit")
    plan = fit.read_plan(place / "out", fit.Asked(**facts["asked"]))
    with pytest.raises(InputError, match=r"All runs in \S+ have diverged. Lower --learning-rate"):
        fit.score_runs(plan.study(tmp_path), HeldOutSettings(0.1), None, None)


@pytest.mark.parametrize(("words", "problem"), [
    (("digits", "--noise", "40"), "Did you mean 40/255"),
    (("digits", "--noise", "0.1", "--like", "x"), "Expected noise or like, got both"),
    (("digits", "--budget", "soon"), "budget='soon'"),
    (("digits", "--methods", "bothe"), "Did you mean 'both'?"),
    (("digits", "--methods", "both", "both"), "each method once"),
    (("digits", "--clean-share", "2"), "clean_share=2"),
    (("digits", "--image-size", "8", "8"), "image_size only with folder:PATH"),
    (("digits", "--like", "."), "16 x 16 pixels"),
    (("digit",), "Did you mean 'digits'?"),
    (("folder:none",), "Expected a folder of images or a CSV file at none"),
    (("digits", "--init-from", "none.safetensors"), "Expected a file of weights, got none.safete"),
])
def test_bad_input_is_one_line(words, problem, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save("a.png")
    assert call("fit", *words) == 2
    assert problem in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]
