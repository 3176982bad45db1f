"""`bench train`: what it writes is what it measured, and from what."""

import dataclasses
import importlib.util
import json
import os

import jax
import numpy as np
import pytest
from command_line import call, one_line

from experiments.bench import programs, timing, train
from jaxrobust.app import files
from jaxrobust.parallel import make_layout

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(name="measured", scope="module")
def _measured(tmp_path_factory):
    """All sections, without PyTorch where it is not installed."""
    folder = tmp_path_factory.mktemp("bench") / "train"
    with pytest.MonkeyPatch.context() as patch:
        # PyTorch's threads wait for each other by spinning, for seconds where cores are shared.
        patch.setattr(timing, "cores", lambda: 1)
        assert call("bench", "--quick", "--out", folder) == 0
    return folder, files.read_json(folder / "bench.json")


def test_every_section_is_measured_and_on_the_page(measured):
    folder, result = measured
    page = (folder / "bench.md").read_text()
    assert list(result["sections"]) == list(train.SECTIONS) == list("abcdefghi")
    for letter, section in result["sections"].items():
        assert f"## ({letter}) " in page
        assert section["provenance"]["seconds"] > 0
        assert len(section["provenance"]["load_average"]) == 2
    for name in ("scaling", "devices"):
        assert f"({name}.png)" in page
        assert (folder / f"{name}.png").is_file() and (folder / f"{name}.svg").is_file()
    provenance = result["sections"]["a"]["provenance"]
    assert provenance["commit"] in page and jax.__version__ in page
    if importlib.util.find_spec("torch") is not None:
        assert provenance["versions"]["torch"] in page
    assert {row["section"] for row in result["ratios"]} == set("abcdefgh")


def test_verdicts_follow_from_the_ratios(measured):
    _, result = measured
    judged = [row for row in result["ratios"] if "met" in row]
    assert len(judged) >= 3
    for row in judged:
        assert row["met"] == {"at least": row["ratio"] >= row["target"],
                              "at most": row["ratio"] <= row["target"]}[row["bound"]]
    for row in result["ratios"]:
        assert ("ratio" in row) != ("not_measured" in row)


def test_ratios_of_programs_are_quotients_of_their_times(measured):
    _, result = measured
    case, = result["sections"]["e"]["result"]["cases"]
    ratio, = (row for row in result["ratios"] if row["section"] == "e")
    times = case["ms_per_update"]
    np.testing.assert_allclose(
        ratio["ratio"], times["together"]["median"] / times["one"]["median"])
    # On CPUs it is the processor time of the host's thread that counts.
    case = result["sections"]["f"]["result"]["cases"][0]
    ratio, = (row for row in result["ratios"] if row["section"] == "f" and "target" in row)
    assert case["form"] == "1 update" and ratio["target"] == 0.02
    times = case["ms_per_update"]
    np.testing.assert_allclose(ratio["ratio"], times["thread"]["median"] / times["step"]["median"])
    assert times["returns"]["median"] <= times["step"]["median"] and case["calls"] > 2


def test_the_first_step_is_the_sum_of_what_comes_before_it(measured):
    folder, result = measured
    case, = result["sections"]["h"]["result"]["cases"]
    for kind in ("cold", "warm"):
        assert set(case[kind]) == set(programs.PHASES)
        assert all(seconds >= 0 for seconds in case[kind].values())
    # Compiling again from the cache, which nothing else makes so much shorter.
    assert case["warm"]["compile"] < case["cold"]["compile"] / 2
    row, = (row for row in result["ratios"] if row["section"] == "h")
    total = {kind: sum(seconds for phase, seconds in case[kind].items() if phase != "second")
             for kind in ("cold", "warm")}
    np.testing.assert_allclose(row["ratio"], total["warm"] / total["cold"])


def test_devices_are_those_asked_for(measured):
    _, result = measured
    found = result["sections"]["g"]["result"]
    assert found["shared_cores"]
    assert [(case["form"], case["devices"]) for case in found["cases"]] == [
        ("jit", 1), ("mesh", 2), ("pmap", 2)]


def test_what_is_there_is_kept_and_what_is_named_is_measured_anew(measured, monkeypatch):
    folder, before = measured
    measured_now = []
    sections = {letter: section._replace(measure=lambda _, __, letter=letter, section=section: (
        measured_now.append(letter) or before["sections"][letter]["result"]))
        for letter, section in train.SECTIONS.items()}
    monkeypatch.setattr(train, "SECTIONS", sections)
    assert call("bench", "train", "--quick", "--out", folder) == 0
    assert measured_now == []
    assert files.read_json(folder / "bench.json") == before
    assert call("bench", "--quick", "--only", "d", "b", "--out", folder) == 0
    assert measured_now == ["d", "b"]
    after = files.read_json(folder / "bench.json")
    assert list(after["sections"]) == list("abcdefghi")
    assert {letter for letter in sections if after["sections"][letter] != (
        before["sections"][letter])} == {"b", "d"}
    # With other settings it is measured anew.
    after["sections"]["e"]["settings"]["programs"]["seeds"] = 77
    files.write_json(folder / "bench.json", after)
    assert call("bench", "--quick", "--out", folder) == 0
    assert measured_now == ["d", "b", "e"]


def test_a_kill_leaves_the_sections_that_were_done(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "SECTIONS", train.SECTIONS | {
        "i": train.SECTIONS["i"], "h": train.SECTIONS["h"]._replace(measure=killed)})
    folder = tmp_path / "train"
    assert call("bench", "--quick", "--only", "i", "h", "--out", folder) == 130
    assert list(files.read_json(folder / "bench.json")["sections"]) == ["i"]
    assert "Not measured: an epoch of ResNet18" in (folder / "bench.md").read_text()


def test_rows_of_pytorch_say_why_they_are_missing(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: (
        None if name == "torch" else find_spec(name, *rest)))
    folder = tmp_path / "train"
    assert call("bench", "--quick", "--only", "a", "c", "--out", folder) == 0
    result = files.read_json(folder / "bench.json")
    reasons = [row["not_measured"] for row in result["ratios"]]
    # Two forms of the loss, three of the step at each of two batch sizes: every ratio here.
    assert len(reasons) == 8
    assert all("PyTorch is not installed" in reason for reason in reasons)
    page = (folder / "bench.md").read_text()
    assert page.count("not measured |") == 8 and "PyTorch is not installed" in page
    assert "torch" not in result["sections"]["a"]["provenance"]["versions"]


@pytest.mark.parametrize("arguments, said", [
    (("--only", "z"), "Unknown section 'z'"),
    (("train", "--only", "a", "losses"), "Unknown section 'losses'"),
    (("curvature", "--only", "a"), "Expected only with a benchmark that has sections (train)"),
    (("trian",), "Did you mean 'train'?"),
], ids=["letter", "word", "without_sections", "benchmark"])
def test_bad_words_are_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("bench", *arguments, "--quick") == 2
    assert said in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_another_benchmark_s_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"benchmark": "curvature"}\n')
    assert call("bench", "--quick", "--only", "i", "--out", tmp_path) == 2
    assert "holds another configuration" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_compiled_loop_computes_what_single_updates_do():
    settings = programs.QUICK
    config = programs.run_config("digits", settings)
    dataset, layout = programs.dataset_of(config, settings.num_images), make_layout("jit")
    single, loop, unrolled = (
        programs.Runner([config], dataset, layout, number, loop=looping)
        for number, looping in ((1, False), (2, True), (2, False)))
    single.call(), single.call(), loop.call(), unrolled.call()
    for other in (loop, unrolled):
        assert other.state.step == single.state.step == 2
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-5), other.state.params, single.state.params)


def test_random_weights_are_of_the_size_that_keeps_a_network_going():
    config = programs.run_config("resnet18", programs.QUICK, seed=3)
    state = programs.random_state(config, programs.noise_images(8))
    kernel = state.params["stem_conv"]["kernel"]
    bound = np.prod(kernel.shape[:-1])**-0.5
    assert 0.5 * bound < abs(kernel).max() <= bound
    assert np.all(state.params["stem_bn"]["scale"] == 1)
    assert np.all(state.batch_stats["stem_bn"]["var"] == 1)
    assert np.all(state.batch_stats["stem_bn"]["mean"] == 0)


def test_a_failed_process_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'case'"):
        programs._in_process("start", {}, {})


def test_settings_survive_the_way_to_another_process():
    for settings in (programs.Settings(), programs.ACCELERATOR, programs.QUICK):
        given = json.loads(json.dumps(dataclasses.asdict(settings)))
        assert programs._settings(given) == settings


def test_other_processes_leave_this_one_s_environment_alone(measured):
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == jax.config.jax_compilation_cache_dir
    assert len(jax.devices()) == 8
