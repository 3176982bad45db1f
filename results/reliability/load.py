"""Puts load on the commands, and records memory, open files and time; see load.md.

    python results/reliability/load.py updates --number 100000
    python results/reliability/load.py stream --number 10000000
    python results/reliability/load.py report --number 200
    python results/reliability/load.py predict --number 100000
    python results/reliability/load.py page

``updates`` trains the small network on digits, with log, checkpoints and TensorBoard events as in
any run. ``stream`` trains it for one epoch, in batches of 100, on images made when they are read.
``report`` writes the report of copies of a run, five seeds to a row. ``predict`` classifies image
files of 64 x 64 pixels. Each writes a JSON file; ``page`` makes load.md and its figure of them.

The work is done by a process of its own, looked at ten times a second. Slopes are by least
squares over the means of 20 blocks, after the first fifth of the work and before the last
twentieth, with their 95 % interval; of open files, over the fewest in each block.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import scipy.stats
from matplotlib import ticker
from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from jaxrobust import data  # noqa: E402
from jaxrobust.app import config, files, provenance, recipe, trainer  # noqa: E402
from jaxrobust.app.execution import Feed  # noqa: E402
from jaxrobust.app.report import figures  # noqa: E402

PLACE = pathlib.Path(__file__).parent / "load"
BLOCKS, DRAWN = 20, 200
READ = 25
"""Images in a reading: a quarter of a batch, by each of four threads."""
EDGE = 64


class Sample(NamedTuple):
    """A process at a moment."""

    done: float  # the work done so far
    seconds: float  # since it began
    cpu_seconds: float  # of all its threads
    bytes: int  # resident
    open_files: int


class Watched(NamedTuple):
    """What a process took."""

    samples: list[Sample]
    peak_bytes: int


def watch(command: Sequence[str], folder: pathlib.Path, done: Callable[[], float]) -> Watched:
    """Runs a command to its end; its output goes to ``output`` in the folder."""
    samples, peak, start = [], 0, time.monotonic()
    output = folder / "output"
    with output.open("w") as printed, subprocess.Popen(
            command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}) as process:
        while process.poll() is None:
            proc = pathlib.Path(f"/proc/{process.pid}")
            try:
                open_files = len(os.listdir(proc / "fd"))
                ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
                status = dict(line.split(":", 1) for line in
                              (proc / "status").read_text().splitlines())
                resident, peak = (1024 * int(status[name].split()[0])
                                  for name in ("VmRSS", "VmHWM"))
            except (OSError, KeyError):  # It has just ended.
                continue
            samples.append(Sample(
                done(), time.monotonic() - start,
                sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), resident, open_files))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n"
                         f"{output.read_text()[-2000:]}")
    return Watched(samples, peak)


def jaxrobust(*arguments) -> list[str]:
    return [sys.executable, "-m", "jaxrobust", *map(str, arguments)]


# --- Slopes ----------------------------------------------------------------------------------


def later(samples: Sequence[Sample]) -> Sample:
    """The samples after the first fifth of the work and before the last twentieth, in which a
    process may end already, each field an array."""
    end = samples[-1].done
    return Sample(*np.array([one for one in samples if end / 5 < one.done < 0.95 * end], float).T)


def slope(x: np.ndarray, y: np.ndarray, of_block=np.mean) -> dict[str, float]:
    """The slope of y over x with its 95 % interval, from the means of blocks, or what else is taken
    of each: neighbouring samples are not independent, means of long blocks nearly are."""
    count = min(BLOCKS, len(x))
    x = np.array([block.mean() for block in np.array_split(x, count)])
    y = np.array([of_block(block) for block in np.array_split(y, count)])
    away = x - x.mean()
    found = away @ y / (away @ away)
    rest = y - y.mean() - found * away
    half = scipy.stats.t.ppf(0.975, count - 2) * np.sqrt(rest @ rest / (count - 2) / (away @ away))
    return {"slope": float(found), "low": float(found - half), "high": float(found + half)}


def rates(done: np.ndarray, spent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What was spent on a unit of work in each of so many blocks, and the blocks' middles."""
    edges = np.linspace(done[0], done[-1], BLOCKS + 1)
    return (edges[1:] + edges[:-1]) / 2, np.diff(np.interp(edges, done, spent)) / np.diff(edges)


def slopes(samples: Sequence[Sample]) -> dict:
    """How memory, open files and the time of a unit of work change with the work done."""
    of = later(samples)
    # Those of a checkpoint being written are open for a moment.
    facts = {"bytes": slope(of.done, of.bytes),
             "open_files": slope(of.done, of.open_files, np.min)}
    for name in ("seconds", "cpu_seconds"):
        middles, each = rates(of.done, getattr(of, name))
        facts[name] = {"mean": float(each.mean()), **slope(middles, each)}
    return facts | {"most_open_files": int(of.open_files.max())}


# --- Loads -----------------------------------------------------------------------------------


def updates(number: int, folder: pathlib.Path, _) -> tuple[Watched, dict]:
    """Trains for so many updates."""
    log, per_epoch = folder / "run" / "metrics.jsonl", len(data.batch_sizes(1200, 64))
    epochs = -(-number // per_epoch)

    def done():
        if not log.is_file():
            return 0
        with log.open("rb") as lines:
            lines.seek(max(0, log.stat().st_size - 4096))
            return max((json.loads(line)["step"] for line in lines.read().split(b"\n")[1:-1]),
                       default=0)

    found = watch(jaxrobust(
        "train", "digits/robust", "--out", folder / "run", "--epochs", epochs,
        "--checkpoint-every", max(1, epochs // 100)), folder, done)
    return found, {"updates": epochs * per_epoch, **slopes(found.samples)}


def stream(number: int, folder: pathlib.Path, _) -> tuple[Watched, dict]:
    """Trains on so many images, read ahead."""
    log = folder / "reads"
    found = watch([sys.executable, __file__, "train", "--number", str(number), "--run",
                   str(folder)], folder,
                  lambda: READ * log.stat().st_size if log.is_file() else 0)
    return found, {"images": number, **slopes(found.samples)}


def train(number: int, folder: pathlib.Path) -> None:
    """What ``stream`` watches. An image is its number in bits; each reading writes a byte."""
    with (folder / "reads").open("wb", buffering=0) as log:

        def read(positions):
            log.write(b".")
            bits = np.unpackbits(np.array(positions, ">u8").view(np.uint8).reshape(-1, 8), axis=1)
            return 255 * bits.reshape(-1, 8, 8, 1)

        def split(size):
            return data.Split(data.StoredImages(read, size, (8, 8, 1), "bits"),
                              np.arange(size, dtype=np.int32) % 10)

        dataset = data.Dataset("bits", split(number), split(100), tuple("0123456789"), (0.5,),
                               (0.5,), flip=False)
        settings = config.with_settings(recipe.RECIPES["digits"].rows["robust"], {
            "optimizer.warmup_epochs": 0.0, "select": "last", "validation_size": 0, "epochs": 1,
            "batch_size": 4 * READ})
        trainer.train(settings, dataset, folder / "run", feed=Feed(input="stream"))


def report(number: int, folder: pathlib.Path, run: pathlib.Path | None) -> tuple[Watched, dict]:
    """Writes one report of so many runs."""
    if run is None:
        run = folder / "run"
        for command in (("train", "digits/robust", "--out", run, "--epochs", 6),
                        ("evaluate", run, "--noise-levels", 0, 16, 32, 48, 64)):
            subprocess.run(jaxrobust(*command), check=True, cwd=ROOT)
    values = json.loads((run / "config.json").read_text())
    runs = [folder / f"run-{index}" for index in range(number)]
    for index, place in enumerate(runs):
        shutil.copytree(run, place, ignore=shutil.ignore_patterns("checkpoints"))
        (place / "config.json").write_text(json.dumps(
            values | {"seed": index % 5, "noise_std": 0.1 + 0.001 * (index // 5)}))
    found = watch(jaxrobust("report", *runs, "--out", folder / "report"), folder, lambda: 0)
    return found, {"runs": number,
                   "page_bytes": (folder / "report" / "report.html").stat().st_size}


def predict(number: int, folder: pathlib.Path, _) -> tuple[Watched, dict]:
    """Classifies so many image files."""
    random = np.random.default_rng(0)

    def paint(place, count):
        place.mkdir(parents=True)
        for index in range(count):
            PIL.Image.new("RGB", (EDGE, EDGE), tuple(random.integers(0, 256, 3).tolist())).save(
                place / f"{index}.png")

    for name in ("one", "other"):
        paint(folder / "photos" / name, 20)
    for first in range(0, number, 1000):
        paint(folder / "images" / str(first // 1000), min(1000, number - first))
    subprocess.run(jaxrobust(
        "train", "photos/normal", "--data", f"folder:{folder / 'photos'}", "--out",
        folder / "run", "--image-size", EDGE, EDGE, "--model", "small_cnn", "--width", 4,
        "--epochs", 2, "--batch-size", 8, "--batch-norm-statistics", "recomputed"),
        check=True, cwd=ROOT)
    output = folder / "output"
    found = watch(jaxrobust("predict", folder / "run", folder / "images"), folder,
                  lambda: output.stat().st_size)
    lines, size = output.read_text().count(f"{folder / 'images'}"), output.stat().st_size
    if lines != number:
        raise SystemExit(f"Expected {number} predictions, got {lines}.")
    samples = [one._replace(done=one.done / size * number) for one in found.samples]
    return Watched(samples, found.peak_bytes), {"images": number, **slopes(samples)}


# --- Page ------------------------------------------------------------------------------------

UNITS = {"updates": "updates", "stream": "images", "predict": "images", "report": "runs"}


def drawn(loads: dict[str, dict]) -> Figure:
    """Memory, open files and time against the work done, a row of panels for each load."""
    shown = [name for name in loads if "bytes" in loads[name]]
    figure = figures.new_figure(11, 2.9 * len(shown))
    style = figures.row_style(0)
    look = {"color": style.color, "linewidth": 1.2}
    for axes, name in zip(figure.subplots(len(shown), 3, squeeze=False), shown, strict=True):
        samples = [Sample(*one) for one in loads[name]["samples"] if one[0]]
        of, steady = Sample(*np.array(samples).T), later(samples)
        middles, each = rates(steady.done, steady.cpu_seconds)
        axes[0].plot(of.done, of.bytes / 1e6, **look)
        axes[1].plot(of.done, of.open_files, **look)
        axes[2].plot(middles, 1e3 * each, marker=style.marker, **look)
        axes[0].set_title(f"{name.capitalize()}", loc="left")
        for ax, label in zip(axes, ("Memory [MB]", "Open files",
                                    f"CPU time [ms / {UNITS[name][:-1]}]"), strict=True):
            ax.set_ylabel(label)
        for ax in axes:
            ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
            ax.set_xlabel(UNITS[name].capitalize())
            ax.set_xlim(0, of.done[-1])
            ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            ax.grid(**figures.GRID)
            ax.spines[["top", "right"]].set_visible(False)
    return figure


def page(place: pathlib.Path) -> None:
    """Writes load.md beside the folder of results, and its figure into it."""
    loads = {path.stem: json.loads(path.read_text()) for name in LOADS
             if (path := place / f"{name}.json").is_file()}
    guard = json.loads((place / "guard.json").read_text())
    figures.save(drawn(loads), place / "load")

    def with_interval(facts, scale, digits):
        slope_, low, high = (f"{round(scale * facts[name], digits) + 0:.{digits}f}"
                             for name in ("slope", "low", "high"))
        return f"{slope_} [{low}, {high}]"

    def cells(name, facts):
        number = facts[UNITS[name]]
        yield from (name, f"{number:,} {UNITS[name]}", f"{facts['whole']['peak_bytes'] / 1e6:.0f}")
        if "bytes" not in facts:
            yield from ("–",) * 4
        else:
            time_ = facts["cpu_seconds"]
            yield from (
                with_interval(facts["bytes"], number / 1e6, 1),
                f"{with_interval(facts['open_files'], number, 0)}, at most "
                f"{facts['most_open_files']}",
                f"{1e3 * time_['mean']:.3g}",
                with_interval(time_, 100 * number / time_["mean"], 1))
        yield from (f"{facts['whole'][clock] / 60:.1f}" for clock in ("cpu_seconds", "seconds"))

    facts = [*loads.values(), guard]
    words = "\n\n".join(__doc__.strip().split("\n\n")[2:]).replace("``", "`")
    lines = [
        "# Loads", "", *words.splitlines(), "",
        "| Load | Size | Peak memory [MB] | Memory, growth [MB] | Open files, growth | "
        "CPU time of one [ms] | its growth [%] | CPU time [min] | Time [min] |",
        "|---|---|" + "---:|" * 7,
        *(f"| {' | '.join(cells(name, one))} |" for name, one in loads.items()), "",
        "Growth is the slope over the whole load, with its 95 % interval. The machine was shared "
        "with other work, so that seconds vary, and CPU seconds with them, less. An epoch leaves "
        "the line of its log in memory, 2 kB, and a checkpoint 40 kB of text that TensorStore "
        "0.1.86 does not free (`ts.KvStore.Spec.to_json`).", "",
        "![Memory, open files and CPU time against the work done](load/load.png)", "",
        "## The check for what is not finite", "", *_guard_lines(guard["cases"]), "",
        "## Where the numbers come from", "",
        *(f"- `{one['provenance']['command']}`, commit {one['provenance']['commit']}, "
          f"{one['provenance']['hardware']}, JAX {one['provenance']['versions']['jax']}, "
          f"{one['provenance']['started']}" for one in facts), ""]
    files.write_text(place.with_suffix(".md"), "\n".join(lines))


def _guard_lines(cases: Sequence[dict]) -> Iterator[str]:
    yield ("What `when_not_finite=\"stop\"` adds to an update of `robust` on images of 32 x 32 "
           "(`guard.py`): median over pairs of calls, with its 95 % interval. On CPUs it is a pass "
           "over parameters and momenta.")
    yield ""
    yield "| Network | Width | Batch | Pairs | CPU time [ms] | Cost in it [%] | Cost in time [%] |"
    yield "|---|" + "---:|" * 6
    for case in cases:
        costs = (f"{100 * case[clock]['cost']:.2f} [{100 * case[clock]['low']:.2f}, "
                 f"{100 * case[clock]['high']:.2f}]" for clock in ("cpu_seconds", "seconds"))
        yield (f"| {case['model']} | {case['width']} | {case['batch']} | {case['pairs']} | "
               f"{case['cpu_seconds']['milliseconds']:.1f} | {' | '.join(costs)} |")


LOADS = {"updates": updates, "stream": stream, "report": report, "predict": predict}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=[*LOADS, "train", "page"])
    parser.add_argument("--number", type=int, help="updates, images or runs")
    parser.add_argument("--run", type=pathlib.Path, help="a tested run for report to copy")
    parser.add_argument("--out", type=pathlib.Path, default=PLACE, help="folder of the results")
    asked = parser.parse_args()
    if asked.load == "train":
        train(asked.number, asked.run)
        return
    if asked.load == "page":
        page(asked.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        found, facts = LOADS[asked.load](asked.number, pathlib.Path(folder), asked.run)
    *_, last = found.samples
    shown = found.samples[::-(-len(found.samples) // DRAWN)]
    facts |= {"whole": {"seconds": last.seconds, "cpu_seconds": last.cpu_seconds,
                        "peak_bytes": found.peak_bytes},
              "fields": Sample._fields, "samples": shown, "provenance": provenance.describe()}
    asked.out.mkdir(parents=True, exist_ok=True)
    files.write_json(asked.out / f"{asked.load}.json", facts)


if __name__ == "__main__":
    main()
