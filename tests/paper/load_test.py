"""Small versions of the loads of results/reliability/load.py.

The memory of a small process is that of its start. What Python and NumPy hold, and what is on the
device, is exact, whatever else the machine does.
"""

import gc
import importlib.util
import os
import pathlib
import shutil
import tracemalloc

import jax
import PIL.Image
import pytest
from command_line import call

from jaxrobust.app import config, predict, progress, trainer
from jaxrobust.app.recipe import RECIPES

SCRIPT = pathlib.Path(__file__).parents[2] / "results" / "reliability" / "load.py"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Orbax warns about itself.


@pytest.fixture
def held():
    """Makes ``() -> bytes`` that are held: in memory, as far as Python and NumPy know, and on the
    device."""
    def look():
        gc.collect()
        return tracemalloc.get_traced_memory()[0] + sum(
            array.nbytes for array in jax.live_arrays())

    tracemalloc.start()
    yield look
    tracemalloc.stop()


def test_memory_and_open_files_do_not_grow_with_the_updates(digits, held, tmp_path, monkeypatch):
    settings = config.with_settings(RECIPES["digits"].rows["robust"], {
        "train_size": 64, "batch_size": 16, "width": 2, "num_features": 4, "epochs": 30,
        "checkpoint_every": 10})
    record, sizes, open_files = trainer._Running.record, [], []

    def record_and_look(self, *arguments):
        record(self, *arguments)
        sizes.append(held())
        open_files.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(trainer._Running, "record", record_and_look)
    trainer.train(settings, digits, tmp_path / "run")
    # Between checkpoints, an epoch of four updates leaves its line of the log.
    assert (sizes[18] - sizes[11]) / 7 < 4000
    # A checkpoint leaves the text that TensorStore does not free.
    assert (sizes[29] - sizes[19]) < 100_000
    assert len(set(open_files[1:])) == 1


def test_streaming_holds_no_image_that_is_done(held, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("load", SCRIPT)
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    advance, done, sizes = progress.Progress.advance, [], {}

    def advance_and_look(self, *arguments, **values):
        advance(self, *arguments, **values)
        done.append(self)
        if len(done) in (20, 70):
            sizes[len(done)] = held()

    monkeypatch.setattr(progress.Progress, "advance", advance_and_look)
    load.train(8_000, tmp_path)
    # An update has 100 images of 64 bytes. For each of ten million there are 200 bytes in all.
    assert len(done) == 80 and (sizes[70] - sizes[20]) / 50 < 1000


def test_a_report_takes_little_more_memory_for_each_run(held, tmp_path, shared_study):
    peaks = []
    for number in (1, 1, 6):  # The first one imports what pictures need.
        runs = [tmp_path / f"{len(peaks)}-{index}" for index in range(number)]
        for seed, run in enumerate(runs):
            shutil.copytree(shared_study / "robust-seed0", run)
            path = run / "config.json"
            path.write_text(path.read_text().replace('"seed": 0', f'"seed": {seed}'))
        before = held()
        tracemalloc.reset_peak()
        assert call("report", *runs, "--out", tmp_path / f"report-{len(peaks)}") == 0
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    assert (peaks[2] - peaks[1]) / 5 < 1e6, peaks


def test_predictions_hold_no_image_that_is_done(held, tmp_path, shared_study, digits):
    for number in range(400):
        PIL.Image.fromarray(digits.test.images[number % 300, ..., 0]).save(
            tmp_path / f"{number}.png")
    paths = predict.files_in([tmp_path])
    sizes = {}
    for number, _ in enumerate(predict.predict_files(
            *predict.load_classifier(shared_study / "robust-seed0", tmp_path), paths)):
        if number in (99, 339):  # Each the fourth of a batch of 24.
            sizes[number] = held()
    # An image has 64 bytes, and its array another 100; a path remembers its text.
    assert (sizes[339] - sizes[99]) / 240 < 120, sizes
