"""The benchmarks: their numbers are what they say, and what is there is kept."""

import functools
import importlib.util
import os
import warnings

import jax
import numpy as np
import pytest
from command_line import call, one_line

from experiments import bench
from experiments.bench import folder as folder_bench
from experiments.bench import problem, programs, suite, timing
from jaxrobust import data
from jaxrobust.app import files

TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(autouse=True, scope="module")
def _cache():
    """The command turns the cache of compiled programs off, for its whole process."""
    enabled = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)


@pytest.fixture(name="measured", scope="module", params=[
    pytest.param(name, marks=pytest.mark.slow) for name in bench.BENCHMARKS])
def _measured(request, tmp_path_factory):
    """Every benchmark, whole, without PyTorch where it is not installed."""
    folder = tmp_path_factory.mktemp("bench") / request.param
    with (pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(),
          jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")):
        # Foolbox imports what SciPy deprecates, and promotes ranks and dtypes.
        warnings.filterwarnings("ignore", "Please import", DeprecationWarning)
        # PyTorch's threads wait for each other by spinning, for seconds where cores are shared.
        patch.setattr(timing, "cores", lambda: 1)
        # The processes that are timed compile as those of users do.
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(
            "--xla_cpu_use_fusion_emitters=false", ""))
        assert call("bench", request.param, "--quick", "--out", folder) == 0
    return request.param, folder, files.read_json(folder / "bench.json")


def test_every_section_is_measured_and_on_the_page(measured):
    name, folder, result = measured
    page = (folder / "bench.md").read_text()
    sections = bench.BENCHMARKS[name].sections
    assert list(result["sections"]) == list(sections)
    assert jax.__version__ in page and "A quick run" in page
    for key, section in result["sections"].items():
        facts = section["provenance"]
        assert f"## ({key}) {sections[key].title}" in page and facts["commit"] in page
        assert facts["seconds"] > 0 and len(facts["load_average"]) == 2
        for row in section["result"]["rows"]:
            assert f"| {row['case']} | {row['contender']} |" in page
        drawn = any("against" in row for row in section["result"]["rows"])
        assert drawn == (folder / f"{key}.png").is_file() == (folder / f"{key}.svg").is_file()
        assert drawn == (f"({key}.png)" in page)
    for row in result["ratios"]:
        assert "not_measured" in row or f"| {row['numerator']} / {row['denominator']} |" in page


def test_ratios_are_the_quotients_of_the_times(measured):
    name, _, result = measured
    checked = 0
    for ratio in result["ratios"]:
        rows = {(row["case"], row["contender"]): row["ms"]
                for row in result["sections"][ratio["section"]]["result"]["rows"] if "ms" in row}
        if "smallest" not in ratio:
            continue
        above, below = (rows[ratio["case"], ratio[side]] for side in ("numerator", "denominator"))
        assert above["median"] == np.median(above["rounds"]) > 0
        np.testing.assert_allclose(ratio["ratio"], above["median"] / below["median"])
        by_round = np.divide(above["rounds"], below["rounds"])
        assert (ratio["smallest"], ratio["largest"]) == (by_round.min(), by_round.max())
        checked += 1
    assert checked >= {"train": 5, "curvature": 5, "evaluate": 4, "folder": 0}[name]


def test_verdicts_follow_from_the_ratios(measured):
    name, _, result = measured
    judged = [row for row in result["ratios"] if "met" in row]
    assert len(judged) >= {"train": 3, "curvature": 3, "evaluate": 3, "folder": 0}[name]
    for row in judged:
        assert row["met"] == {"at least": row["ratio"] >= row["target"],
                              "at most": row["ratio"] <= row["target"]}[row["bound"]]
    for row in result["ratios"]:
        assert ("ratio" in row) != ("not_measured" in row)


def test_pytorch_is_compared_with_where_it_is_and_named_where_it_is_not(measured):
    name, folder, result = measured
    peers = [row for row in result["ratios"] if "PyTorch" in row["numerator"] + row["denominator"]]
    # Two forms of the loss and of the step at each of two batch sizes; Eq. 21 in two layouts.
    assert len(peers) == {"train": 6, "curvature": 2, "evaluate": 0, "folder": 0}[name]
    page = (folder / "bench.md").read_text()
    for row in peers:
        facts = result["sections"][row["section"]]["provenance"]
        assert ("torch" in facts["versions"]) == TORCH
        if TORCH:
            assert row["ratio"] > 0
        else:
            assert "PyTorch is not installed" in row["not_measured"] and (
                row["not_measured"] in page)


@pytest.mark.slow
@pytest.mark.parametrize("measured", ["train"], indirect=True)
def test_shares_of_programs_and_of_the_peak_are_quotients(measured):
    _, _, result = measured
    rows = result["sections"]["f"]["result"]["rows"]
    found = [row for row in result["ratios"] if row["numerator"] == "the host's part"]
    assert [row.get("target") for row in found] == [0.02, None, None]
    for ratio, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(ratio["ratio"], row["host_ms"] / row["ms"]["median"])
        assert 0 < ratio["ratio"] < 1
    assert {row["contender"]: row["work"] for row in result["sections"]["j"]["result"]["rows"]} == {
        "`normal`": 1, "`gradient_penalty`": 2}
    step, *products = result["sections"]["d"]["result"]["rows"]
    np.testing.assert_allclose(  # 2 * 64^3 operations in so many milliseconds
        products[0]["tera_per_second"], 2 * 64**3 / products[0]["ms"]["median"] * 1e-9)
    ratio, = (row for row in result["ratios"] if row["section"] == "d")
    np.testing.assert_allclose(ratio["ratio"], step["tera_per_second"] / max(
        row["tera_per_second"] for row in products))


@pytest.mark.slow
@pytest.mark.parametrize("measured", ["evaluate"], indirect=True)
def test_what_the_suite_does_is_a_share_of_plain_inference(measured):
    _, _, result = measured
    rounds = {key: {row["contender"]: row["ms"]["rounds"] for row in section["result"]["rows"]}
              for key, section in result["sections"].items()}
    together = rounds["c"].pop("all corruptions together")
    network, = (rounds["c"].pop(name) for name in list(rounds["c"]) if "plain" in name)
    assert len(rounds["c"]) == len(suite.settings_for(True).corruptions)
    np.testing.assert_allclose(together, np.sum(list(rounds["c"].values()), axis=0))
    versions = result["sections"]["a"]["provenance"]["versions"]
    assert ("foolbox" in versions) == (importlib.util.find_spec("foolbox") is not None)
    ratios = {row["section"]: row for row in result["ratios"] if row["section"] != "a"}
    np.testing.assert_allclose(ratios["c"]["ratio"], np.median(together) / np.median(network))
    for key in "bd":
        assert ratios[key]["numerator"] == "plain inference" and ratios[key]["bound"] == "at least"


@pytest.mark.slow
@pytest.mark.parametrize("measured", ["folder"], indirect=True)
def test_photographs_are_a_share_of_the_update(measured):
    _, _, result = measured
    medians = {row["contender"]: row["ms"]["median"]
               for row in result["sections"]["a"]["result"]["rows"]}
    update = medians.pop("an update of `normal`")
    assert medians["augment on the device"] < update
    assert {row["numerator"]: row["ratio"] for row in result["ratios"]} == pytest.approx(
        {name: median / update for name, median in medians.items()})


def test_what_is_there_is_kept_and_what_is_named_is_measured_anew(tmp_path, monkeypatch):
    now = []

    def section(key):
        def measure(settings):
            now.append(key)
            yield [timing.row("a case", "a contender", [1.0, 2.0])], []

        return bench.Section(key, "", measure, programs.settings_for)

    monkeypatch.setitem(bench.BENCHMARKS, "train", bench.Benchmark(
        "Title", {key: section(key) for key in "abc"}))
    folder = tmp_path / "train"
    assert call("bench", "--quick", "--only", "b", "--out", folder) == 0
    assert call("bench", "train", "--quick", "--out", folder) == 0
    assert now == ["b", "a", "c"]
    result = files.read_json(folder / "bench.json")
    assert list(result["sections"]) == ["a", "b", "c"]
    assert call("bench", "--quick", "--out", folder) == 0
    assert files.read_json(folder / "bench.json") == result and now == ["b", "a", "c"]
    assert call("bench", "--quick", "--only", "c", "a", "--out", folder) == 0
    assert now == ["b", "a", "c", "c", "a"]
    # With other settings it is measured anew.
    result["sections"]["b"]["settings"]["seeds"] = 77
    files.write_json(folder / "bench.json", result)
    assert call("bench", "--quick", "--out", folder) == 0
    assert now == ["b", "a", "c", "c", "a", "b"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.BENCHMARKS["train"].sections, "b", section("b")._replace(
        measure=killed))
    folder = tmp_path / "killed"
    assert call("bench", "--quick", "--out", folder) == 130
    assert list(files.read_json(folder / "bench.json")["sections"]) == ["a"]


def test_what_cannot_be_measured_says_why(monkeypatch):
    with pytest.raises(timing.NotMeasured, match="takes over an hour on a CPU"):
        next(programs.measure_epoch(programs.Settings()))
    monkeypatch.setattr(problem.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in problem.why_no_torch()
    rows = [timing.row("a case", "one", [1.0, 2.0])]
    assert timing.ratios(rows, [timing.Pair("one", "other", "at least", 2)], "gone") == [
        {"numerator": "one", "denominator": "other", "case": "a case", "bound": "at least",
         "target": 2, "not_measured": "gone"}]


@pytest.mark.parametrize("arguments, said", [
    (("--only", "z"), "Unknown section 'z'"),
    (("curvature", "--only", "a", "memory"), "Unknown section 'memory'"),
    (("curvatur",), "Did you mean 'curvature'?"),
], ids=["letter", "word", "benchmark"])
def test_bad_words_are_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("bench", *arguments, "--quick") == 2
    assert said in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, said", [
    ("thesis.tex", "precious", "holds no settings.json"),
    ("settings.json", '{"benchmark": "curvature"}\n', "holds another configuration"),
], ids=["other", "benchmark"])
def test_a_folder_with_something_else_is_left_alone(name, content, said, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert call("bench", "--quick", "--out", tmp_path) == 2
    assert said in one_line(capsys)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_the_photographs_of_the_benchmark_are_as_large_as_said(tmp_path):
    kilobytes = folder_bench.write_photographs(tmp_path, 4, (45, 60))
    found = sorted(tmp_path.rglob("*.jpg"))
    assert [path.parent.name for path in found] == ["china", "china", "flower", "flower"]
    assert kilobytes == pytest.approx(np.mean([path.stat().st_size for path in found]) / 1000)
    assert {data.read_image(path, (45, 60)).shape for path in found} == {(45, 60, 3)}
    assert len({path.read_bytes() for path in found}) == 4


def test_contenders_take_turns_and_another_one_begins_each_round():
    order = []
    times = timing.in_turn({name: functools.partial(order.append, name) for name in "abc"}, 2)
    calls = {name: (order.count(name) - 1) // 2 for name in "abc"}
    # An untimed call of each, then two rounds; so short a call is made many times in its turn.
    assert min(calls.values()) > 1
    assert order == list("abc") + [name for name in "abcbca" for _ in range(calls[name])]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.slow
def test_a_compiled_loop_computes_what_single_updates_do():
    settings = programs.settings_for(True)
    config = programs.run_config("digits", settings)
    dataset = programs.dataset_of(config, settings)
    single, loop, unrolled = (
        programs.Runner([config], dataset, number, loop=looping)
        for number, looping in ((1, False), (2, True), (2, False)))
    single.call(), single.call(), loop.call(), unrolled.call()
    assert len(single.host) == 2 and min(single.host) > 0
    for other in (loop, unrolled):
        assert other.state.step == single.state.step == 2
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5), other.state.params, single.state.params)


@pytest.mark.slow
def test_an_epoch_is_as_many_updates_as_there_are_batches():
    config = programs.run_config("digits", programs.settings_for(True), batch_size=500)
    runner = programs.Runner([config], data.load_dataset("digits"), 2)
    runner.epoch()
    runner.epoch()
    assert runner.num_images == 1200 and runner.state.step == 2 * 3  # 500, 500 and 200
