"""`reproduce` of tables, figures and questions: everything at the tiny scale, from nothing."""

import dataclasses
import json
import math
import pathlib
import shutil
import statistics

import markdown
import numpy as np
import PIL.Image
import pytest
import real_formats
from command_line import call, one_line

from experiments import paper, targets
from experiments.recipes import STUDIES, ablations, methods
from experiments.recipes.scales import SCALES
from experiments.recipes.suites import settings_of
from jaxrobust import data
from jaxrobust.app import files
from jaxrobust.app.config import InputError, get_setting, with_epochs
from jaxrobust.app.program import work_of
from jaxrobust.app.recipe import METHOD_LABELS, RECIPES, get_recipe
from jaxrobust.app.report import frame
from jaxrobust.app.report.page import duration
from jaxrobust.app.study import run
from jaxrobust.app.study.plan import fit_recipe, place_of
from jaxrobust.app.study.read import load_study, with_rows

# TensorBoard's writer, Orbax and TFDS warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory):
    """Small data sets in the real formats, and everything made from them."""
    place, random = tmp_path_factory.mktemp("targets"), np.random.default_rng(0)
    for name, write, sizes in (("cifar10", real_formats.write_cifar10, (80,)),
                               ("svhn_cropped", real_formats.write_svhn, (400, 80))):
        raw, *_ = write(place / f"raw-{name}", random, *sizes)
        real_formats.prepare(name, raw, place / "data")
    real_formats.write_folder(place / "road", random, 110)
    assert call("reproduce", "all", *words(place)) == 0
    return place


def words(place):
    return ("--scale", "tiny", "--data", f"folder:{place / 'road'}", "--data-dir", place / "data",
            "--no-tensorboard", "--out", place / "runs")


def made(place, name):
    """A target's folder, its content for machines, and the tables of its page."""
    folder = place / "runs" / "tiny" / name
    return (folder, files.read_json(folder / f"{name}.json"),
            markdown.tables((folder / f"{name}.md").read_text()))


def bare(cells):
    """Without what marks the best and the paper's."""
    return [cell.strip("*") for cell in cells]


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.TARGETS)
def test_every_target_is_made_with_its_tables_and_figures(name, place):
    folder, content, tables = made(place, name)
    target, page = targets.TARGETS[name], (folder / f"{name}.md").read_text()
    assert page.startswith(f"# {target.title}\n")
    assert [study["name"] for study in content["studies"]] == [
        STUDIES[key]["tiny"].name for key in target.studies if "tiny" in STUDIES[key]]
    # Each picture that the page shows is there, and is no empty one.
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert all(f"]({picture})" in page for picture in pictures)
    assert page.count("![") == len(pictures)
    for picture in pictures:
        with PIL.Image.open(folder / picture) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert len(tables) + len(pictures) >= len(target.studies)
    expected = {"table": (1, 0), "figure": (0, 1), "transfer": (1, 1), "flatness": (1, 1),
                "corruptions": (1, 1), "survival": (3, 2), "methods": (9, 1)}.get(
                    name.rstrip("0123456789"), (4, 2))
    assert len(tables) >= expected[0] and len(pictures) >= expected[1]
    for study in content["studies"]:
        assert study["commit"] and study["hardware"] and study["versions"]["jax"]
        assert all(run["seconds"] > 0 for run in study["runs"].values())
    assert (folder / f"{name}.csv").is_file() == ("numbers" in content) == bool(target.numbers)
    if not target.numbers:
        return
    # Numbers of its rows, and of none else, as the table has them.
    numbers = frame.read_csv(folder / f"{name}.csv")
    for study in content["studies"]:
        rows = set(target.rows or study["rows"])
        found = set(numbers.row[numbers.study == study["name"]]) - {""}
        assert found == rows == set(study["rows"])
    assert all(isinstance(line["mean"], float) for line in content["numbers"] if "mean" in line)


@pytest.mark.slow
def test_the_rows_of_a_question_are_compared_with_one_of_them(place):
    _, _, (accuracy, difference, *_) = made(place, "alignment")
    _, *rows, commonest = map(bare, accuracy[1])
    assert commonest[0].startswith("always “")
    by_label = {row[0]: row[1:-1] for row in rows}
    reference = STUDIES["ablations"]["tiny"].labels["robust"]
    assert f"“{reference}”" in difference[0]
    peer = by_label.pop(reference)
    assert len(by_label) == 3 and [row[0] for row in difference[1][1:]] == list(by_label)
    for label, *cells in difference[1][1:]:
        for cell, own, other in zip(cells, by_label[label], peer, strict=True):
            expected = float(own.split()[0]) - float(other.split()[0])
            assert float(cell.replace("−", "-")) == pytest.approx(expected, abs=0.011)


@pytest.mark.slow
@pytest.mark.parametrize("name, key", [("table1", "table1"), ("table2", "table2"),
                                       ("table3", "table3")])
def test_ours_the_papers_and_the_difference_are_one_below_the_other(name, key, place):
    _, _, ((_, (_, *rows)), (caption, _)) = made(place, name)
    assert "less that of “Training on both clean and noisy images”" in caption
    rows = list(map(bare, rows))
    *heads, commonest = (row[0] for row in rows)
    assert len(heads) == 15 and commonest.startswith("always “")
    recipe = STUDIES[targets.TARGETS[name].studies[0]]["tiny"]
    for index, method in enumerate(recipe.rows):
        ours, theirs, difference = (bare(row[1:-1]) for row in rows[3 * index : 3 * index + 3])
        evaluation = files.read_json(
            place / "runs" / recipe.name / f"{method}-seed0" / "evaluation.json")
        for column, (mean, _) in enumerate(paper.TABLES[key].rows[method]):
            accuracy = 100 * statistics.fmean(evaluation["levels"][column]["accuracies"])
            assert float(ours[column].split()[0]) == pytest.approx(accuracy, abs=0.006)
            assert float(theirs[column].split()[0]) == pytest.approx(mean, abs=0.006)
            assert float(difference[column].replace("−", "-")) == pytest.approx(
                accuracy - mean, abs=0.006)


@pytest.mark.slow
def test_table_4_has_every_perturbation_of_the_paper(place):
    _, _, ((_, (_, *rows)),) = made(place, "table4")
    *heads, commonest = (bare(row)[0] for row in rows)
    assert commonest.startswith("always “")
    assert [head.removeprefix("paper: ") for head in heads[1::3]] == list(paper.TABLE4.rows)
    assert all(head.startswith("paper: ") for head in heads[1::3])
    assert set(heads[2::3]) == {"difference"}


@pytest.mark.slow
def test_table_5_is_of_clean_images_alone(place):
    _, _, tables = made(place, "table5")
    for (_, (head, *rows)), key in zip(
            tables[::2], ("table5_cifar10", "table5_svhn"), strict=True):
        assert head == ["Method", "Clean", "Training time"]
        theirs = [float(row[1]) for row in rows if row[0].startswith("*paper: ")]
        assert theirs == [row[0][0] for row in paper.TABLES[key].rows.values()]
    metrics = files.read_lines(
        place / "runs" / "table5_cifar10_tiny" / "alpha_beta-seed0" / "metrics.jsonl")
    assert "accuracy_noisy" not in metrics[0] and metrics[0]["margin"] > 0


@pytest.mark.slow
def test_what_is_done_is_not_done_again(place, capsys):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("*-seed0/*.json*")}

    before = stamps()
    assert call("reproduce", "figure9", *words(place)[:2], *words(place)[4:]) == 0
    assert stamps() == before
    said = capsys.readouterr().out
    # The rows of the figure alone.
    assert "cifar10_tiny: 2 runs (2 rows, seeds 0), 2 done, 0 begun" in said
    assert "0 s" in said


@pytest.mark.slow
def test_runs_in_parallel_are_those_of_one_after_the_other(place, tmp_path, monkeypatch):
    # The processes find the package where this one did.
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert call("reproduce", "cifar10_tiny", "--rows", "normal", "noisy", "--jobs", "2",
                "--data-dir", place / "data", "--no-report", "--no-tensorboard",
                "--out", tmp_path / "study") == 0
    for row in ("normal", "noisy"):
        alone, together = (place_of(study, row, 0)
                           for study in (place / "runs" / "cifar10_tiny", tmp_path / "study"))
        assert (together / "curvature.npz").is_file()
        for name in ("levels", "perturbations"):
            assert (files.read_json(together / "evaluation.json")[name]
                    == files.read_json(alone / "evaluation.json")[name])


@pytest.mark.slow
def test_the_suite_is_measured_in_parallel_with_the_same_result(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[2]))
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    study = place / "runs" / "cifar10_tiny"
    shutil.copytree(study, tmp_path / "cifar10_tiny")
    for path in tmp_path.glob("cifar10_tiny/*/corruptions.*"):
        path.unlink()
    assert call("reproduce", "corruptions", "--scale", "tiny", "--jobs", "2", "--no-tensorboard",
                "--data-dir", place / "data", "--out", tmp_path) == 0
    for row in STUDIES["cifar10"]["tiny"].rows:
        alone, together = (files.read_json(place_of(folder, row, 0) / "corruptions.json")
                           for folder in (study, tmp_path / "cifar10_tiny"))
        assert together["counts"] == alone["counts"] and len(alone["counts"]) == 5


def test_a_plan_is_all_that_a_dry_run_makes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs = tmp_path / "photographs"
    make_photographs(photographs, {"a": 5, "b": 7})
    for scale in SCALES:
        assert call("reproduce", "all", "--scale", scale, "--dry-run", "--data",
                    f"folder:{photographs}") == 0
        said = capsys.readouterr().out
        there = [name for name, study in STUDIES.items() if scale in study]
        for name, target in targets.TARGETS.items():
            line = f"{name}: {target.title}; in runs/{scale}/{name}"
            # At the medium scale neither curvature nor other perturbations are measured.
            assert (line in said) == (any(study in there for study in target.studies) and not (
                scale == "medium" and name in ("figure10", "survival", "transfer")))
        for name in there:
            assert f"{STUDIES[name][scale].name}: " in said
        assert said.count("on one GPU") == len(there)
    # At the tiny scale, the last.
    assert there == [name for name in STUDIES if name != "methods_digits"]
    assert call("reproduce", "digits", "--dry-run") == 0
    assert "digits: 15 runs (5 rows, seeds 0, 1, 2), 0 done" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [photographs]


def make_photographs(folder, counts):
    """A folder of images of noise, so many of each class."""
    rng = np.random.default_rng(0)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)
            PIL.Image.fromarray(image).save(folder / label / f"{index}.png")


def test_a_plan_says_which_runs_the_suite_is_done_for(capsys):
    assert call("reproduce", "questions", "--scale", "small", "--dry-run") == 0
    said = capsys.readouterr().out
    count = 3 * len(STUDIES["cifar10"]["small"].rows)
    for kind in ("corruptions", "attacks", "certificates"):
        assert said.count(f"  {kind}: 0 of {count} runs done") == 1
    assert call("reproduce", "table1", "--scale", "small", "--dry-run") == 0
    assert "runs done" not in capsys.readouterr().out


def test_the_suite_draws_the_training_noise_and_knows_the_curvature_of_its_images():
    for scale, recipe in STUDIES["cifar10"].items():
        found = settings_of(recipe, scale)
        assert found["corruptions"].limit is None and found["certificates"].sigma == 0.06
        if scale in ("small", "tiny"):
            assert all(found[kind].limit <= recipe.curvature.num_images
                       for kind in ("attacks", "certificates"))


def test_a_plan_for_a_folder_has_the_hours_of_its_images(tmp_path, capsys):
    make_photographs(tmp_path / "few", {"a": 20, "b": 30})
    assert call("reproduce", "road_small", "--data", f"folder:{tmp_path / 'few'}", "--dry-run") == 0
    said = capsys.readouterr().out
    cost = STUDIES["road"]["small"].cost
    # 50 of the images that the recipe's hours are for.
    assert "of 50 images, all training images" in said
    assert f"--jobs 2: {duration(3600 * cost.cpu_hours * 50 / cost.images)}," in said


@pytest.mark.parametrize("data, expected", [
    ("folder:nowhere", "Expected a folder of images or a CSV file at nowhere, got nothing."),
    (None, "Expected data=folder:PATH, a folder of images, for road_small"),
    ("folder:", "Expected data=folder:PATH, a folder of images, for road_small")])
@pytest.mark.parametrize("dry", [True, False])
def test_a_plan_for_a_folder_that_is_not_there_is_refused(
        data, expected, dry, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("reproduce", "road_small", *(["--data", data] if data else []),
                *(["--dry-run"] if dry else [])) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.iterdir())


def dataset_of(per_class, num_test):
    """A data set of so many training images of each of some classes, and test images."""
    labels = np.repeat(np.arange(len(per_class), dtype=np.int32), per_class)
    test = np.resize(np.arange(len(per_class), dtype=np.int32), num_test)
    splits = (data.Split(np.zeros((len(rows), 8, 8, 3), np.uint8), rows) for rows in (labels, test))
    names = tuple("abcdefgh"[:len(per_class)])
    return data.Dataset("few", *splits, names, (0.5,) * 3, (0.5,) * 3, flip=True)


def test_a_recipe_is_fitted_to_a_small_data_set():
    recipe = STUDIES["road"]["small"]
    large = dataset_of([200] * 4, 200)
    assert fit_recipe(recipe, large) == (recipe, [])
    # An eighth of 24 images is 3, too few for one of each of four classes.
    fitted, lines = fit_recipe(recipe, dataset_of([6] * 4, 8))
    for row, config in fitted.rows.items():
        assert (config.validation_size, config.batch_size) == (4, 20)
        assert config == dataclasses.replace(
            recipe.rows[row], validation_size=4, batch_size=20)
    assert fitted.curvature.num_images == 8 and fitted.evaluation == recipe.evaluation
    assert lines == [
        f"few has 24 training and 8 test images of 4 classes: {change}." for change in (
            "validation_size is 4 instead of 0.125", "batch_size is 20 instead of 32",
            "num_images is 8 instead of 64")]
    # Numbers that are for a larger set: 40 for validation, 80 to train on, 60 for the tests.
    fitted, _ = fit_recipe(STUDIES["road"]["tiny"], dataset_of([20, 30], 12))
    run = next(iter(fitted.rows.values()))
    assert (run.validation_size, run.train_size, run.batch_size) == (10, None, 40)
    assert fitted.evaluation.test_size is None and fitted.curvature.num_images == 12
    with pytest.raises(InputError, match="Expected more images in few: of 5 training images"):
        fit_recipe(recipe, dataset_of([4, 1], 4))


@pytest.mark.slow
def test_all_of_a_recipe_runs_on_a_few_photographs(tmp_path, capsys):
    make_photographs(tmp_path / "few", {"a": 8, "b": 9})
    (tmp_path / "few" / "b" / "9.png").write_bytes(b"no image")
    words = ("reproduce", "road_tiny", "--data", f"folder:{tmp_path / 'few'}", "--rows", "normal",
             "--no-tensorboard", "--data-dir", tmp_path / "data", "--out", tmp_path / "study")
    assert call(*words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("b/9.png: ") and said[-1].endswith(
        "Add --skip-bad to skip them.")
    assert not (tmp_path / "study").exists()
    assert call(*words, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "batch_size is" in said and "The report is in" in said
    run = tmp_path / "study" / "normal-seed0"
    # A command without such a flag does not advise it.
    written = files.read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps(written | {"skip_bad": False}))
    assert call("evaluate", run, "--name", "again", "--data-dir", tmp_path / "data") == 2
    said = capsys.readouterr().err
    assert "Bad files in" in said and "--skip-bad" not in said


def test_a_target_of_two_data_sets_can_be_made_of_one(capsys):
    assert call("reproduce", "paper", "--scale", "small", "--dry-run", "--studies", "cifar10",
                "table5_cifar10") == 0
    said = capsys.readouterr().out
    assert "table1" in said and "figure11" in said and "table5_cifar10_small" in said
    assert "svhn" not in said and "road" not in said and "table2" not in said


@pytest.mark.parametrize("arguments, expected", [
    (("table6",), "Unknown table, figure, question or recipe 'table6'. Did you mean 'table"),
    (("table1", "--scale", "smal"), "Unknown scale 'smal'. Did you mean 'small'?"),
    (("table5", "--scale", "medium"), "Expected scale='medium' as one of full, small, tiny for "),
    (("digits", "--scale", "small"), "Expected scale only with a table, figure or question"),
    (("digits", "--studies", "cifar10"), "Expected studies only with a table, figure"),
    (("table1", "--rows", "robust"), "Expected rows only with a recipe"),
    (("table3", "--scale", "small"), "Expected data=folder:PATH, a folder of images, for table3"),
    (("figure9", "--studies", "cifar"), "Unknown study 'cifar'. Did you mean 'cifar10'?"),
    (("table1", "--jobs", "2", "--parallel", "jit"), "Expected jobs=1 with several devices"),
])
def test_bad_input_is_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("reproduce", *arguments) == 2
    assert expected in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_data_sets_are_looked_for_before_anything_is_run(tmp_path, capsys):
    assert call("reproduce", "figure8", "--scale", "tiny", "--data-dir", tmp_path / "data",
                "--out", tmp_path / "runs") == 2
    assert "The data set cifar10 is not prepared in" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_the_rows_of_a_question_differ_in_what_it_asks():
    for scale, recipe in STUDIES["ablations"].items():
        for name, question in ablations.QUESTIONS.items():
            configs = [recipe.rows[row] for row in question.rows]
            assert question.reference in question.rows
            if scale != "tiny":  # which has one network for all.
                assert len(set(configs)) == len(configs), name
    small = STUDIES["ablations"]["small"].rows
    changes = {
        "naive": ("robust.compact_centroids", "robust.norm_centroids"),
        "momentum": ("robust.margin_centroids",), "slow": ("robust.momentum",),
        "half": ("noise_std",), "double": ("noise_std",), "uniform": ("perturb",),
        "laplace": ("perturb",), "speckle": ("perturb",), "salt_and_pepper": ("perturb",),
        "robust_one": ("one_pass",), "lam_0": ("robust.lam",), "lam_4": ("robust.lam",),
        "lam_20": ("robust.lam",), "robust_relu": ("feature_layer",),
        "robust_pooled": ("feature_layer", "num_features"), "both": ("method",)}
    for row, names in changes.items():
        found = {name for name in _settings(small["robust"])
                 if get_setting(small[row], name) != get_setting(small["robust"], name)}
        # The margin's centroids are naive and the others' have momentum in the paper.
        assert found == set(names), row


def _settings(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_rows_at_equal_work_cost_what_both_does():
    for scale in ("full", "small"):
        recipe = STUDIES["methods"][scale]
        both = recipe.rows[methods.REFERENCE]
        assert work_of(both) == 2 and len(set(recipe.rows.values())) == len(recipe.rows)
        alike = {f"{row}_work": run for row, run in recipe.rows.items()
                 if not row.endswith("_work") and work_of(run) != 2}
        assert list(alike) == [row for row in recipe.rows if row.endswith("_work")]
        assert len(alike) == 14
        for row, alone in alike.items():
            equal = recipe.rows[row]
            assert alone.epochs == both.epochs
            # Rounded to whole epochs.
            assert abs(equal.epochs - 2 * both.epochs / work_of(equal)) <= 0.5, row
            # The schedule keeps its places in the whole.
            assert equal == with_epochs(alone, equal.epochs), row
            assert equal.optimizer.warmup_epochs / equal.epochs == pytest.approx(
                alone.optimizer.warmup_epochs / alone.epochs), row
            assert abs(equal.checkpoint_every - alone.checkpoint_every * equal.epochs
                       / alone.epochs) <= 0.5, row
        half = recipe.rows["sam_work"]
        assert (half.epochs, work_of(half)) == (both.epochs // 2, 4)
        if scale == "full":
            assert half.optimizer.decay_epochs == (30, 60, 80)


def test_the_variations_of_the_papers_loss_differ_in_its_options_alone():
    rows = STUDIES["methods"]["small"].rows
    for row, names in {
            "direction": {"direction", "delta_d", "alpha", "beta", "lam"}, "other": {"align_to"},
            "relative": {"margin_relative", "delta_d"},
            "linear_warm": {"compact_linear_beyond", "alpha", "lam"}}.items():
        changed = {name for name in _settings(rows[row])
                   if get_setting(rows[row], name) != get_setting(rows["robust_both"], name)}
        assert changed - {"constraint_warmup_epochs"} == {f"robust.{name}" for name in names}
        assert ("constraint_warmup_epochs" in changed) == (row == "linear_warm")


def test_families_of_noise_have_the_power_of_the_gaussian():
    """On values uniform in [0, 1], before clipping, up to the rounding of what is written."""
    import jax

    from jaxrobust import perturbations

    small = STUDIES["ablations"]["small"].rows
    images = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3)) * 0.5 + 0.25
    for row in ("uniform", "laplace"):
        perturb = perturbations.parse_perturbation(small[row].perturb)
        change = perturb(jax.random.key(1), images) - images
        assert math.sqrt(float((change**2).mean())) == pytest.approx(0.06, rel=0.02), row


def test_every_recipe_of_a_study_says_what_it_costs():
    for study, scales in STUDIES.items():
        # Not every study is made for a GPU, and those of digits, which are small, for none.
        digits = {"digits": {"full"}, "methods_digits": {"full", "tiny"}}
        assert {*SCALES} - {*scales} <= {"medium"} | digits.get(study, set())
        assert list(scales) == [scale for scale in SCALES if scale in scales]
        for recipe in scales.values():
            assert recipe.cost is not None and recipe.cost.cpu_hours > 0, recipe.name
            assert recipe is RECIPES[recipe.name]
        assert next(iter(scales.values())).name == study


@pytest.mark.slow
def test_a_study_with_some_rows_has_those_alone(place):
    study = load_study(place / "runs" / "cifar10_tiny")
    part = with_rows(study, ("normal", "robust"))
    assert list(part.labels) == ["normal", "robust"] == list(part.runs)
    assert with_rows(study, None) is study
    empty = dataclasses.replace(study, runs={**study.runs, "both": ()})
    with pytest.raises(InputError, match="a finished run of cifar10_tiny in both, found none"):
        with_rows(empty, ("both",))


def test_the_papers_recipes_are_those_of_appendix_h1():
    for name, dataset, noise, table in (
            ("cifar10", "cifar10", 0.06, "table1"), ("svhn", "svhn_cropped", 0.15, "table2")):
        recipe = get_recipe(name)
        assert tuple(recipe.rows) == tuple(METHOD_LABELS)
        assert recipe.evaluation.noise_levels == paper.TABLES[table].levels
        assert recipe.evaluation.num_draws == 10
        for method, config in recipe.rows.items():
            assert (config.method, config.dataset, config.noise_std) == (method, dataset, noise)
            assert (config.model, config.width, config.num_features) == ("resnet18", 64, 128)
            assert (config.epochs, config.batch_size, config.crop_padding) == (200, 64, 4)
            optimizer = config.optimizer
            assert (optimizer.learning_rate, optimizer.momentum) == (1e-3, 0.9)
            assert (optimizer.weight_decay, optimizer.clip_norm) == (5e-4, None)
            assert (optimizer.decay_epochs, optimizer.decay_factor) == ((60, 120, 160), 0.2)
            loss = config.robust
            assert (loss.alpha, loss.beta, loss.gamma_reg, loss.lam) == (1, 1, 1e-3, 1)
            assert (loss.delta_v, loss.delta_d, loss.momentum) == (0.5, 5, 0.9)
            assert config.constraint_warmup_epochs == 0 and config.stability_weight == 1


def test_the_papers_numbers_are_those_of_its_tables():
    shared = json.dumps([paper.TABLES[name].rows["robust"][0][0]
                         for name in ("table1", "table2", "table3")])
    assert shared == "[92.67, 96.13, 97.37]"
    for table in paper.TABLES.values():
        assert all(len(row) == len(table.levels) for row in table.rows.values())
        assert all(0 < mean < 100 for row in table.rows.values() for mean, _ in row)
