"""The questions on corruptions and on attacks: images joined by index, coefficients, tables."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from experiments import carry_over, survival
from jaxrobust import corruptions
from jaxrobust.app import run_folder
from jaxrobust.app.config import InputError
from jaxrobust.app.measurements import attacks, certificates, networks
from jaxrobust.app.measurements.corruptions import BY_SEVERITY
from jaxrobust.app.measurements.curvature import CURVATURES
from jaxrobust.app.report import frame
from jaxrobust.app.study.read import Run, Study

ROWS = ("normal", "both", "robust")
SETTINGS = {"sigma": 0.06, "n0": 10, "n": 100, "alpha": 0.001}


def study_of(runs):
    return Study(name="toy", title="Toy", note="", command="", commit="",
                 labels={row: row.title() for row in runs}, methods={row: row for row in runs},
                 seeds=(0, 1, 2), paper=None, paper_rows={}, paper_perturbed=None,
                 paper_perturbations={}, class_names={}, runs=runs)


def network(folder, row, seed, random):
    """A run with curvature of 30 images, of which 24 are attacked, the last first, and 20
    certified."""
    place = folder / f"{row}-seed{seed}"
    place.mkdir()
    label = np.arange(30) % 4
    correct = random.random(30) < 0.7
    curved = {"index": np.arange(30), "label": label, "correct": correct,
              "loss": random.exponential(size=30), **{
                  key: random.exponential(size=30) for key in CURVATURES}}
    write(place, "curvature", {"settings": {"test_size": 50}, "median": {
        key: float(np.median(curved[key])) for key in CURVATURES}}, curved)
    rows = np.arange(24)[::-1]
    distance = np.where(correct, random.random(30), 0)
    number = len(rows)
    broken = np.where(correct[rows], "square", "clean")
    broken[np.flatnonzero(correct[rows])[:4 + seed]] = ""
    write(place, "attacks", {
        "subset": "the first 24 of 50", "num_images": number, "first_of": 50, "num_test": 99,
        "norms": [attacks._of_ball("linf", 8 / 255, broken, [
            {"attacks": ["clean", "square"], "warnings": {}, "zero_gradients": 0}])],
        "nearest": [attacks._of_nearest("l2", distance[rows])]}, {
            "norm": np.repeat(["linf", "l2"], number), "index": np.tile(rows, 2),
            "epsilon": np.repeat([8 / 255, np.inf], number), "label": np.tile(label[rows], 2),
            "broken_by": np.concatenate([broken, np.full(number, "")]),
            "distance": np.concatenate([np.full(number, np.nan), distance[rows]])})
    certified = {"index": np.arange(20), "label": np.where(correct, label, -1)[:20],
                 "radius": random.random(20), "target": label[:20]}
    radii = certificates.certified_radii(certified)
    write(place, "certificates", {
        "subset": "the first 20 of 50", "num_images": 20, "first_of": 50, "num_test": 99,
        "settings": SETTINGS, "abstained": int((certified["label"] == -1).sum()),
        "average_radius": [float(radii.mean()), 0.0, 1.0],
        "curve": [{"radius": radius, "right": int((radii >= radius).sum())}
                  for radius in (0.01, 0.5)]}, certified)
    levels = [{"std_255": 0, "accuracies": [float(random.random())]},
              {"std_255": 8, "accuracies": [float(random.random())]}]
    return Run(folder=place, seed=seed, config=None, provenance={}, epochs=(),
               evaluation={"levels": levels})


def write(place, kind, facts, arrays):
    run_folder.write_facts(place, kind, facts)
    run_folder.write_arrays(place, kind, arrays)


def change(run, kind, facts=(), arrays=()):
    """Writes a measurement again with some changes."""
    write(run.folder, kind, run.facts(kind) | dict(facts),
          run_folder.read_arrays(run.folder, kind) | dict(arrays))


@pytest.fixture(name="study")
def _study(tmp_path):
    random = np.random.default_rng(0)
    return study_of({row: tuple(network(tmp_path, row, seed, random) for seed in range(3))
                     for row in ROWS})


def columns_of(run):
    """What is known of the first 20 images, the slow way."""
    curved, attacked, certified = (run_folder.read_arrays(run.folder, kind) for kind in (
        "curvature", "attacks", "certificates"))
    found = {name: [] for name in (*CURVATURES, "loss", *survival.OUTCOMES)}
    for image in range(20):
        at, = np.flatnonzero(curved["index"] == image)
        for name in (*CURVATURES, "loss"):
            found[name].append(curved[name][at])
        at, = (at for at in range(48) if attacked["index"][at] == image
               and np.isinf(attacked["epsilon"][at]))
        found[survival.DISTANCE].append(attacked["distance"][at])
        right = certified["label"][image] == certified["target"][image]
        found[survival.CERTIFIED].append(certified["radius"][image] if right else 0)
    return {name: np.array(values) for name, values in found.items()}


def test_images_are_joined_by_their_index(study):
    for _, run, joined in survival.joined_networks(study):
        np.testing.assert_array_equal(joined.positions, np.arange(20))
        np.testing.assert_array_equal(joined.label, np.arange(20) % 4)
        expected = columns_of(run)
        assert joined.columns.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(joined.columns[name], values, err_msg=name)
        # Right ones, and none else, are at a distance.
        np.testing.assert_array_equal(joined.correct, joined.columns[survival.DISTANCE] > 0)


def test_different_images_are_refused(study):
    run = study.runs["both"][1]
    kept = run_folder.read_arrays(run.folder, "certificates")
    change(run, "certificates", {"first_of": 20})
    with pytest.raises(InputError, match="the first of 50 .curvature., 50 .attacks., 20 .cert"):
        survival.joined_networks(study)
    change(run, "certificates", {"first_of": 50}, {"target": (kept["target"] + 1) % 4})
    with pytest.raises(InputError, match="got different labels of images with the same index"):
        survival.joined_networks(study)
    change(run, "certificates", arrays={name: values[:19] for name, values in kept.items()})
    with pytest.raises(InputError, match="both-seed1 than in .*normal-seed0"):
        survival.joined_networks(study)
    change(run, "certificates", arrays=kept)
    # Without a size, curvature is of the first of all test images.
    change(run, "curvature", {"settings": {"test_size": None}})
    with pytest.raises(InputError, match="the first of 99 .curvature."):
        survival.joined_networks(study)
    for kind in ("attacks", "certificates"):
        change(run, kind, {"first_of": 99})
    assert survival.join(study.runs["both"][1]).first_of == 99


def test_networks_without_a_measurement_or_its_arrays_are_left_out(study):
    for row, kind in (("normal", "attacks"), ("both", "certificates"), ("robust", "curvature")):
        run_folder.arrays_path(study.runs[row][0].folder, kind).unlink()
    left = study_of({row: tuple(dataclasses.replace(run) for run in runs)
                     for row, runs in study.runs.items()})
    assert [(row, run.seed) for row, run, _ in survival.joined_networks(left)] == [
        (row, seed) for row in ROWS for seed in (1, 2)]


def test_coefficients_within_networks_are_scipys_and_in_the_table_of_numbers(study):
    table = survival.numbers(study)
    values = table.set_index(["row", "seed", "measurement", "condition"]).value.to_dict()
    means = {condition: list(lines.value) for condition, lines in table[
        table.measurement.str.startswith(survival.MEAN_WITHIN)].groupby("condition")}
    assert len(means) == len(survival.OUTCOMES) * len(survival.IMAGES) * len(CURVATURES)
    for outcome in survival.OUTCOMES:
        for key, name in CURVATURES.items():
            found = {images: [] for images in survival.IMAGES}
            for row, run, joined in survival.joined_networks(study):
                columns, correct = columns_of(run), joined.correct
                every = [columns[one] for one in (key, outcome, "loss")]
                right = [column[correct] for column in every]
                xy, xz, yz = (stats.spearmanr(right[one], right[other]).statistic
                              for one, other in ((0, 1), (0, 2), (1, 2)))
                for images, value in zip(survival.IMAGES, (
                        stats.spearmanr(*every[:2]).statistic, xy,
                        (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))), strict=True):
                    found[images].append(value)
                    assert values[row, run.seed, survival.WITHIN, f"{outcome}, {images}, {name}"
                                  ] == pytest.approx(value)
            for images, each in found.items():
                value, low, high = means[f"{outcome}, {images}, {name}"]
                assert value == pytest.approx(np.mean(each)) and low < value < high


def test_coefficients_over_networks_are_scipys(study, monkeypatch):
    monkeypatch.setattr(networks, "FEWEST", 9)
    found = survival.across(study)
    runs = [run for row in ROWS for run in study.runs[row]]
    medians = [run.medians["finite_difference"] for run in runs]
    clean = [run.evaluation["levels"][0]["accuracies"][0] for run in runs]
    robust = [list(run.facts("attacks")["norms"][0]["robust"].values())[-1] for run in runs]
    radius = [run.facts("certificates")["average_radius"][0] for run in runs]
    for head, values in (("robust accuracy, L∞ 8/255", robust),
                         ("average certified radius", radius)):
        xy, xz, yz = (stats.spearmanr(*pair).statistic for pair in (
            (medians, values), (medians, clean), (values, clean)))
        assert found[head]["finite_difference"].value == pytest.approx(xy)
        assert found[f"{head}, clean accuracy held fixed"]["finite_difference"].value == (
            pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))))
    assert "accuracy, clean" not in found
    monkeypatch.setattr(networks, "FEWEST", 10)
    assert survival.across(study) == {}


def test_the_tables_by_method_hold_means_spreads_and_students_intervals(study):
    table, differences, *_ = survival.section(study).tables
    assert table.columns == ("Measured", "Normal", "Both", "Robust")
    cells = {row.head: row.cells for row in table.rows}
    assert list(cells)[:2] == ["accuracy, clean [%]", "robust accuracy, L∞ 8/255 [%]"]
    by_row = {row: [run.facts("certificates")["average_radius"][0] for run in study.runs[row]]
              for row in ROWS}
    best = max(ROWS, key=lambda row: np.mean(by_row[row]))
    for row, cell in zip(ROWS, cells["average certified radius [pixels]"], strict=True):
        values = by_row[row]
        assert cell.text == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        assert cell.bold == (row == best)
    robust = [100 * (4 + seed) / 24 for seed in range(3)]
    assert cells["robust accuracy, L∞ 8/255 [%]"][1].text == (
        f"{np.mean(robust):.2f} ± {np.std(robust, ddof=1):.2f}")
    assert differences.columns == ("Measured", "Both", "Robust")
    line, = (row for row in differences.rows if row.head == "average certified radius [pixels]")
    for row, cell in zip(ROWS[1:], line.cells, strict=True):
        test = stats.ttest_ind(by_row[row], by_row["normal"])
        ends = test.confidence_interval(0.95)
        points = np.mean(by_row[row]) - np.mean(by_row["normal"])
        assert cell.text == f"{points:+.4f} ± {(ends.high - ends.low) / 2:.4f}".replace("-", "−")
        assert cell.bold == (test.pvalue < 0.05)


def test_the_page_says_where_fab_was_beaten_or_found_nothing(study):
    def details():
        return survival.section(study).tables[0].details

    assert "FAB" not in details() and "broke" not in details()
    run = study.runs["robust"][2]
    table = run_folder.read_arrays(run.folder, "attacks")
    # Image 23 comes first: the ensemble breaks it within 0.5 and FAB beyond, and 22 within both.
    table["distance"][24:26] = 0.6, 0.4
    more = {"norm": ["l2"] * 2, "index": [23, 22], "epsilon": [0.5] * 2, "label": [3, 2],
            "broken_by": ["fab-t", "square"], "distance": [np.nan] * 2}
    change(run, "attacks", {"nearest": [run.facts("attacks")["nearest"][0] | {"not_found": 3}]},
           {name: np.concatenate([values, more[name]]) for name, values in table.items()})
    assert "FAB found nothing, which count as farthest: 3 of 216." in details()
    assert "in a ball in L2 smaller than FAB’s distance: 1." in details()


def test_the_section_has_its_tables_and_pictures(study):
    section = survival.section(study)
    assert [picture.name for picture in section.pictures] == ["surviving", "curvature-survival"]
    captions = " ".join(table.caption for table in section.tables)
    for words in ("What survives, by method", "less that of “Normal”", "over networks",
                  "mean over the networks", "The same by method"):
        assert words in captions
    # The share of images that are farther than a radius, mean over the seeds.
    line = section.pictures[0].figure.axes[0].lines[0]
    place, share = (values[100] for values in line.get_data())
    expected = np.mean([(run_folder.read_arrays(run.folder, "attacks")["distance"][24:] > place
                         ).mean() for run in study.runs["normal"]])
    assert share == pytest.approx(100 * expected)
    points = [line.get_xydata()[0] for line in section.pictures[1].figure.axes[0].lines]
    assert len(points) == 9


# --- Corruptions -------------------------------------------------------------------------------


@pytest.fixture(name="corrupted")
def _corrupted(tmp_path):
    """Three rows of three seeds under the 15 corruptions."""
    random, runs = np.random.default_rng(1), {}
    for row in ROWS:
        runs[row] = ()
        for seed in range(3):
            place = tmp_path / f"{row}-seed{seed}"
            place.mkdir()
            means = {name: [float(random.random()), 0.0, 1.0] for name in corruptions.BENCHMARK}
            run_folder.write_facts(place, "corruptions", {
                "origin": "generated", "num_images": 200, "subset": "200 of 400 test images",
                "counts": [{"name": "clean", "severity": 0, "right": 150 + seed, "number": 200},
                           {"name": "fog", "severity": 3, "right": 90 + seed, "number": 200}],
                "mean_by_corruption": means,
                "mean": [float(np.mean([mean[0] for mean in means.values()])), 0.0, 1.0]})
            runs[row] += (Run(folder=place, seed=seed, config=None, provenance={}, epochs=(),
                              evaluation={"epoch": None}),)
    return study_of(runs)


def test_accuracies_under_corruptions_are_compared_by_corruption_and_group(corrupted):
    table, differences = carry_over.section(corrupted).tables
    heads = [row.head for row in table.rows]
    assert "Corruptions: generated." in table.details
    assert heads[:4] == ["clean", "gaussian_noise", "shot_noise", "impulse_noise"]
    assert len(heads) == 1 + 15 + 1 + 5 and all("mean of" in head for head in heads[16:])

    def by_seed(row, names):
        return [100 * np.mean([run.facts("corruptions")["mean_by_corruption"][name][0]
                               for name in names]) for run in corrupted.runs[row]]

    groups = {"fog": ["fog"], "noise, mean of 3": corruptions.BENCHMARK[:3],
              "all but noise, mean of 12": corruptions.BENCHMARK[3:],
              "mean of 15": corruptions.BENCHMARK}
    for head, names in groups.items():
        line, = (row for row in table.rows if row.head == head)
        for row, cell in zip(ROWS, line.cells, strict=True):
            values = by_seed(row, names)
            assert cell.text == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        line, = (row for row in differences.rows if row.head == head)
        for row, cell in zip(ROWS[1:], line.cells, strict=True):
            own, peer = by_seed(row, names), by_seed("normal", names)
            ends = stats.ttest_ind(own, peer).confidence_interval(0.95)
            points = np.mean(own) - np.mean(peer)
            assert cell.text == f"{points:+.2f} ± {(ends.high - ends.low) / 2:.2f}".replace(
                "-", "−")
            assert cell.bold == (ends.low > 0 or ends.high < 0)


def test_generated_and_official_corruptions_are_told_apart(corrupted):
    place = corrupted.runs["both"][0].folder
    run_folder.write_facts(place, "corruptions", run_folder.read_facts(
        place, "corruptions") | {"origin": "official"})
    table, _ = carry_over.section(corrupted).tables
    assert "Corruptions: generated and official." in table.details
    cells = {row.head: [cell.text for cell in row.cells] for row in table.rows}
    assert cells["fog, official"][::2] == ["–", "–"] and "±" not in cells["fog, official"][1]
    assert "–" not in cells["fog, generated"]


def test_the_numbers_of_corruptions_are_in_one_table(corrupted):
    values = frame.values_of(frame.frame(corrupted, carry_over.numbers))
    assert values["both", carry_over.IMAGES, ""] == (200, 200, 200)
    assert values["both", carry_over.ACCURACY, "clean"] == (75, 75.5, 76)
    by_severity = {key: value for key, value in values.items()
                   if key[0] == "both" and key[1].startswith(BY_SEVERITY)}
    assert by_severity == {("both", BY_SEVERITY, "fog 3, generated"): (45, 45.5, 46)}
    expected = tuple(100 * np.mean([run.facts("corruptions")["mean_by_corruption"][name][0]
                                    for name in corruptions.BENCHMARK[3:7]])
                     for run in corrupted.runs["both"])
    assert values["both", carry_over.ACCURACY, "blur, mean of 4, generated"] == (
        pytest.approx(expected))
