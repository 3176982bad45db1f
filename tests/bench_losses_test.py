"""The benchmark of the losses: all forms compute the same, and its numbers are what they say."""

import json

import jax
import numpy as np
import pytest

from experiments.bench import losses as bench
from experiments.bench import timing


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize("size", [bench.Size(64, 128, 10), bench.Size(40, 16, 60)],
                         ids=["few_classes", "many_classes"])
@pytest.mark.parametrize("form", bench.FORMS)
def test_pytorch_computes_the_same_loss_gradients_and_state(form, size, dtype, tolerance):
    pytest.importorskip("torch")
    problem = bench.make_problem(size, dtype)
    with jax.enable_x64(dtype == np.float64):
        total, gradients, state = jax.tree.map(
            np.asarray, bench.value_and_gradients(problem))
    value, (*to_features, to_weight, to_bias), (mean, seen) = bench.make_torch_call(
        problem, form, 1)()
    # The hinge of every term is active, so that all of them are compared.
    assert total.dtype == dtype and total > 1
    assert all(np.abs(gradient).max() > 1e-4 for gradient in gradients)
    np.testing.assert_allclose(value.numpy(), total, rtol=tolerance)
    for theirs, ours in zip((*to_features, to_weight.T, to_bias), gradients, strict=True):
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=0,
                                   atol=tolerance * np.abs(ours).max())
    np.testing.assert_allclose(mean.numpy(), state.mean, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(seen.numpy(), state.seen)


@pytest.fixture(name="measured", scope="module", params=["as installed", "without PyTorch"])
def _measured(request):
    with pytest.MonkeyPatch.context() as patch:
        # Its threads wait for each other by spinning, for seconds where cores are shared.
        patch.setattr(timing, "cores", lambda: 1)
        if request.param == "without PyTorch":
            patch.setattr(bench, "why_no_torch", lambda: "it is not here")
        turns = []
        result = bench.measure_losses(bench.QUICK, lambda name, seconds: turns.append(name))
    assert set(turns) == set(result["sizes"][0]["ms"])
    return request.param, json.loads(json.dumps(result))


def test_ratios_are_the_quotients_of_the_times(measured):
    param, result = measured
    if param == "as installed":
        pytest.importorskip("torch")
        assert result["torch"] == "measured"
    for row, (size, targets) in zip(result["sizes"], bench.QUICK.compared, strict=True):
        assert bench.Size(row["batch_size"], row["dim"], row["num_classes"]) == size
        assert row["temp_bytes"] > 0 and row["ms"]["ours"]["median"] > 0
        assert [(ratio["numerator"], ratio["target"]) for ratio in row["ratios"]] == [*targets]
        for ratio in row["ratios"]:
            if param == "without PyTorch":
                assert ratio["not_measured"] == result["torch"] == "it is not here"
                continue
            above, below = (row["ms"][ratio[side]] for side in ("numerator", "denominator"))
            np.testing.assert_allclose(ratio["ratio"], above["median"] / below["median"])
            by_round = np.divide(above["rounds"], below["rounds"])
            assert (ratio["smallest"], ratio["largest"]) == (by_round.min(), by_round.max())
            assert ratio["met"] == (ratio["ratio"] >= ratio["target"])


def test_the_scaling_has_a_row_for_each_size():
    settings = bench.QUICK
    rows = json.loads(json.dumps(bench.measure_scaling(settings)))
    sizes = [(row["sweep"], row["batch_size"], row["dim"], row["num_classes"]) for row in rows]
    assert sizes == [
        *(("num_classes", settings.batch_size, settings.dim, c) for c in settings.classes),
        *(("dim", settings.batch_size, d, settings.num_classes) for d in settings.dims),
        *(("batch_size", b, settings.dim, settings.num_classes) for b in settings.batch_sizes)]
    for row in rows:
        assert row["temp_bytes"] > 0
        assert row["ms"]["median"] > 0
        np.testing.assert_allclose(row["ms"]["median"], np.median(row["ms"]["rounds"]))
        assert len(row["ms"]["rounds"]) == settings.scaling_rounds
