"""The benchmarks: what they compare computes the same, and their numbers are what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call
from optax.losses import softmax_cross_entropy_with_integer_labels

from experiments import bench
from experiments.bench import curvature as curvature_bench
from experiments.bench import folder as folder_bench
from experiments.bench import timing
from jaxrobust import curvature, data, probes
from jaxrobust.app import files

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

STEP = 1e-2


@pytest.mark.usefixtures("enable_x64")
def test_pytorch_computes_the_same_logits_and_eq_21():
    torch = pytest.importorskip("torch")
    from experiments.bench import torch_peer

    torch.set_num_threads(1)
    problem = curvature_bench.make_problem(
        curvature_bench.Case(num_classes=3, image_size=16, width=4, batch_size=2))
    model = problem.model.clone(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), dtype=jnp.float64)
    # Biases, scales and statistics as of a trained network: before, they are 0 or 1 throughout.
    draw = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(np.float64(leaf) + draw.uniform(-0.1, 0.1, leaf.shape)),
        problem.variables)
    images, labels = problem.images.astype(jnp.float64), problem.labels

    @jax.jit
    def logits(x):
        return model.apply(variables, x, train=False).logits

    module = torch_peer.convert(model, variables)
    assert not module.training and module.head.weight.dtype == torch.float64
    converted = torch_peer.to_torch(np.asarray(images))
    np.testing.assert_allclose(module(converted).numpy(), logits(images), rtol=1e-10)

    key, num_probes = jax.random.key(2), 3
    ours = jax.jit(lambda images: curvature.finite_difference_curvature(
        lambda x: softmax_cross_entropy_with_integer_labels(logits(x), labels), images, key,
        step=STEP, num_probes=num_probes).value)(images)
    # The probes as the documentation of `finite_difference_curvature` says they are drawn.
    own = probes.salted(key, "finite_difference_curvature")
    vectors = [jnp.stack([jax.random.normal(
        jax.random.fold_in(jax.random.fold_in(own, k), i), images.shape[1:], images.dtype)
        for i in range(len(images))]) for k in range(num_probes)]
    theirs = torch_peer.finite_difference_curvature(
        module, converted, torch.tensor(np.asarray(labels)),
        lambda k: torch_peer.to_torch(np.asarray(vectors[k])), step=STEP, num_probes=num_probes)
    assert np.all(ours > 1e-6)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-8)


@pytest.fixture(name="measured", scope="module", params=["as installed", "without PyTorch"])
def _measured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "curvature"
    with pytest.MonkeyPatch.context() as patch:
        # Its threads wait for each other by spinning, for seconds where cores are shared.
        patch.setattr(timing, "cores", lambda: 1)
        if request.param == "without PyTorch":
            patch.setattr(curvature_bench.importlib.util, "find_spec", lambda name: None)
        assert call("bench", "curvature", "--quick", "--out", folder) == 0
    return folder, files.read_json(folder / "bench.json")


def test_ratios_are_the_quotients_of_the_times(measured):
    _, result = measured
    by_width = {(case["width"], case["num_classes"]): case["ms_per_image"]
                for case in result["cases"]}
    checked = 0
    for row in result["ratios"]:
        if "not_measured" in row:
            continue
        times = by_width[row["width"], result["settings"]["num_classes"]]
        above, below = (times[row[side]] for side in ("numerator", "denominator"))
        assert row["numerator_ms"] == above["median"] == np.median(above["rounds"])
        assert row["denominator_ms"] == below["median"] == np.median(below["rounds"])
        np.testing.assert_allclose(row["ratio"], row["numerator_ms"] / row["denominator_ms"])
        by_round = np.divide(above["rounds"], below["rounds"])
        assert (row["smallest"], row["largest"]) == (by_round.min(), by_round.max())
        assert row["met"] == {"at least": row["ratio"] >= row["target"],
                              "at most": row["ratio"] <= row["target"]}[row["bound"]]
        checked += 1
    assert checked >= 4


def test_a_further_probe_is_the_rest_of_the_time_shared_out(measured):
    _, result = measured
    times = result["cases"][0]["ms_per_image"]
    for name in ("eq21", "frobenius"):
        shared = np.subtract(times[name]["rounds"], times[f"{name}_one"]["rounds"])
        np.testing.assert_allclose(times[f"{name}_marginal"]["rounds"],
                                   shared / (result["settings"]["num_probes"] - 1))


def test_pytorch_is_compared_with_where_it_is_and_named_where_it_is_not(measured):
    folder, result = measured
    peers = [row for row in result["ratios"] if row["numerator"].startswith("torch")]
    assert len(peers) == 2
    page = (folder / "bench.md").read_text()
    if result["torch"] == "measured":
        assert all(row["ratio"] > 0 for row in peers)
        assert "torch" in result["provenance"]["versions"]
    else:
        assert [row["not_measured"] for row in peers] == [result["torch"]] * 2
        assert "not measured" in page and "PyTorch is not installed" in page


def test_the_page_and_its_figures_are_written_with_their_origin(measured):
    folder, result = measured
    page = (folder / "bench.md").read_text()
    assert result["provenance"]["commit"] in page and jax.__version__ in page
    for row in result["ratios"]:
        assert "not_measured" in row or f"| {row['ratio']:.2f} |" in page
    for name in ("cost", "memory"):
        assert f"({name}.png)" in page
        assert (folder / f"{name}.png").is_file() and (folder / f"{name}.svg").is_file()


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert call("bench", "curvature", "--quick", "--out", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_benchmark_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("bench", "curvatur") == 2
    assert capsys.readouterr().err == (
        "error: Unknown benchmark 'curvatur'. Did you mean 'curvature'? "
        f"Expected one of: {', '.join(bench.BENCHMARKS)}.\n")
    assert not list(tmp_path.iterdir())


def test_photographs_are_timed_on_their_way_to_the_network(tmp_path):
    folder = tmp_path / "bench"
    assert call("bench", "folder", "--quick", "--out", folder) == 0
    result = files.read_json(folder / "folder.json")
    costs = result["ms_per_image"]
    assert all(0 < row["lower_quartile"] <= row["median"] for row in costs.values())
    assert {len(row["rounds"]) for row in costs.values()} == {folder_bench.QUICK.rounds}
    update = costs["an update of normal, with its augmentation and noise"]["median"]
    assert update > costs["augment on the device"]["median"]
    page = (folder / "folder.md").read_text()
    share = costs["add Gaussian noise"]["median"] / update
    assert f"| {100 * share:.1f} % |" in page and result["provenance"]["commit"] in page
    assert all(f"| {name} |" in page for name in costs)


def test_the_photographs_of_the_benchmark_are_as_large_as_said(tmp_path):
    kilobytes = folder_bench.write_photographs(tmp_path, 4, (45, 60))
    files = sorted(tmp_path.rglob("*.jpg"))
    assert [path.parent.name for path in files] == ["china", "china", "flower", "flower"]
    assert kilobytes == pytest.approx(np.mean([path.stat().st_size for path in files]) / 1000)
    assert {data.read_image(path, (45, 60)).shape for path in files} == {(45, 60, 3)}
    assert len({path.read_bytes() for path in files}) == 4


def test_contenders_take_turns_and_another_one_begins_each_round():
    order = []
    times = timing.in_turn({name: functools.partial(order.append, name) for name in "abc"}, 2)
    calls = {name: (order.count(name) - 1) // 2 for name in "abc"}
    # An untimed call of each, then two rounds; so short a call is made many times in its turn.
    assert min(calls.values()) > 1
    assert order == list("abc") + [name for name in "abcbca" for _ in range(calls[name])]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_crossover_is_where_the_two_times_meet():
    # As powers of C: the exact form's times are C, the sampled one's always 30.
    assert curvature_bench.crossover((10, 20, 50, 100), (10, 20, 50, 100), (30,) * 4) == (
        pytest.approx(30))
    assert curvature_bench.crossover((10, 20), (10, 20), (30, 30)) is None
    assert curvature_bench.crossover((10, 20), (40, 80), (30, 30)) == 10
