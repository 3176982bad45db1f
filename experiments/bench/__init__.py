"""Benchmarks of the library: times and memory as ratios, all measured on one machine in one run.

    python -m experiments bench [train | curvature | evaluate | folder]

A benchmark has sections; each is written when it ends, and kept as long as its settings are.
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from experiments.bench import (
    attacks,
    curvature,
    folder,
    losses,
    page,
    programs,
    suite,
    timing,
    train_step,
)
from jaxrobust import _validate
from jaxrobust.app import files, provenance
from jaxrobust.app.report import figures


class Section(NamedTuple):
    """A part of a benchmark, measured and written as a whole."""

    title: str
    note: str  # what was done, and how to read its table
    measure: Callable[[Any], timing.Parts]  # from settings; may raise NotMeasured
    settings_for: Callable[[bool], Any]  # from whether they are quick; a dataclass


class Benchmark(NamedTuple):
    """Sections by letter."""

    title: str
    sections: Mapping[str, Section]


BENCHMARKS = {
    "train": Benchmark("Training: time and memory", {
        "a": Section(
            "The robust loss against PyTorch",
            "The robust loss alone, on random features: value, gradients by features, noisy "
            "features and softmax layer, and the next centroids.",
            losses.measure_losses, losses.settings_for),
        "b": Section(
            "A step of `robust` against one of `both`",
            "A step on a batch already on the device, without reading or augmenting images.",
            train_step.measure_methods, train_step.settings_for),
        "c": Section(
            "A step of ResNet18 against PyTorch",
            "The same step of `normal`: forward, backward, SGD with Nesterov momentum. PyTorch "
            "eager in its own layout, in channels-last, and that one compiled.",
            train_step.measure_peers, train_step.settings_for),
        "d": Section(
            "Share of the arithmetic peak",
            "A step of `normal`, against the fastest product of two square matrices in the same "
            "type.", train_step.measure_peak, train_step.settings_for),
        "e": Section(
            "One seed against several in one program", "Times of an update of every seed.",
            programs.measure_seeds, programs.settings_for),
        "f": Section(
            "The host's part, and several updates in a call",
            "Times of an update. The host is busy until a call returns; the result comes later. "
            "On CPUs, where the same cores compute meanwhile, the processor time of the host's "
            "thread counts, and convolutions are slower inside compiled loops (jax#12868).",
            programs.measure_host, programs.settings_for),
        "g": Section(
            "The robust loss's cost against C, d and B", "The loss with its gradients, alone.",
            losses.measure_scaling, losses.settings_for),
        "i": Section(
            "An epoch",
            "Images resident on the device, without validation and checkpoints. **Projected from "
            "the median epoch: nothing was trained for so long.**",
            programs.measure_epoch, programs.settings_for),
        "j": Section(
            "A step of each method",
            "As (b), with each method's settings by default. The work of its passes is in units of "
            "one of `normal`; the target is for methods with products of second derivatives.",
            train_step.measure_costs, train_step.settings_for_methods),
    }),
    "curvature": Benchmark("Curvature: time and memory", {
        "a": Section(
            "The exact spectrum, exact products and Eq. 21",
            "Milliseconds an image. “Exact spectrum” is `piecewise_linear_spectrum`, “exact "
            "products” is `squared_frobenius`, “Eq. 21” is `finite_difference_curvature`; ResNet18 "
            "with random weights, batch norm in evaluation mode.",
            curvature.measure_compared, curvature.settings_for),
        "b": Section(
            "Cost against the number of classes", "Milliseconds an image.",
            curvature.measure_classes, curvature.settings_for),
        "c": Section(
            "Memory against the number of probes",
            "Working memory of the compiled program, images and weights not counted.",
            curvature.measure_memory, curvature.settings_for),
    }),
    "evaluate": Benchmark("Evaluating robustness: time", {
        "a": Section(
            "PGD against Foolbox",
            "Milliseconds an image of a whole attack, from a random start, with programs compiled "
            "before. Both call the network as it is given, and with its logits compiled and its "
            "weights as constants. “Its gradients alone” are 20 compiled gradients of the loss by "
            "the images, one after the other.",
            attacks.measure, attacks.settings_for),
        "b": Section(
            "Accuracies under noise against plain inference",
            "Milliseconds an image and draw, of the command `evaluate` with its files. Times of "
            "plain inference over those of accuracies are the share of its speed.",
            suite.measure_noise, suite.settings_for),
        "c": Section(
            "Corruptions against plain inference",
            "Milliseconds an image, mean over the severities, without the network. “All "
            "corruptions together” is their sum: an image corrupted in every way, against one pass "
            "of the network on one image.",
            suite.measure_corruptions, suite.settings_for),
        "d": Section(
            "Certificates against plain inference",
            "Milliseconds a draw, of the command `evaluate` with its files.",
            suite.measure_certificates, suite.settings_for),
    }),
    "folder": Benchmark("From a folder of photographs to the network", {
        "a": Section(
            "Decoding, reading, augmenting and noise beside an update",
            "Milliseconds an image. JPEG files, parts of scikit-learn's sample photographs, are "
            "decoded once for a folder, by threads, into a file that later runs share. "
            "Augmentation and noise are part of the update, whose time has them in it.",
            folder.measure, folder.settings_for),
    }),
}


def run(name: str, folder: pathlib.Path, *, quick: bool = False,
        only: Sequence[str] | None = None) -> str:
    """Runs a benchmark; writes ``bench.json``, ``bench.md`` and figures after every case.

    Keeps a section that was measured to its end before, with the same settings, unless ``only``
    names it.
    Returns the table of ratios.
    """
    _validate.one_of("benchmark", name, BENCHMARKS)
    benchmark = BENCHMARKS[name]
    for section in only or ():
        _validate.one_of("section", section, benchmark.sections)
    described = {"benchmark": name, "quick": quick}
    files.claim(folder / "settings.json", json.dumps(described, indent=2) + "\n")
    path = folder / "bench.json"
    done = files.read_json(path)["sections"] if path.is_file() else {}
    wanted = {key: json.loads(json.dumps(dataclasses.asdict(section.settings_for(quick))))
              for key, section in benchmark.sections.items()}
    for key in only or benchmark.sections:
        if not only and done.get(key, {}).get("settings") == wanted[key]:
            continue
        print(f"({key}) {benchmark.sections[key].title}", flush=True)
        for measured, ended in _measure(benchmark.sections[key], quick):
            done[key] = measured | {"settings": wanted[key] if ended else None}
            _write(folder, described | {"title": benchmark.title}, {
                each: done[each] for each in benchmark.sections if each in done})
    return page.ratio_table(files.read_json(path)["ratios"])


def _measure(section: Section, quick: bool) -> Iterator[tuple[dict, bool]]:
    """Yields what is measured so far, after every case, and whether that is all."""
    jax.clear_caches()  # No section uses what another has compiled.
    made, load, start = provenance.describe(), timing.load_average(), time.perf_counter()
    for peer in ("torch", "foolbox"):
        if importlib.util.find_spec(peer) is not None:
            made["versions"][peer] = metadata.version(peer)
    measured: dict[str, Any] = {"rows": [], "ratios": []}

    def described() -> dict:
        return {"title": section.title, "note": section.note, "result": measured,
                "provenance": made | {"load_average": [load, timing.load_average()],
                                      "seconds": time.perf_counter() - start}}

    try:
        for rows, ratios in section.measure(section.settings_for(quick)):
            measured["rows"] += rows
            measured["ratios"] += ratios
            yield described(), False
    except timing.NotMeasured as error:
        measured = {"not_measured": str(error)}
    yield described(), True


def _write(folder: pathlib.Path, described: Mapping, sections: Mapping[str, Mapping]) -> None:
    result = {**described, "sections": sections, "ratios": [
        {"section": key, **row} for key, section in sections.items()
        for row in section["result"].get("ratios", ())]}
    for key, section in sections.items():
        figure = page.figure(section["result"].get("rows", ()))
        if figure is not None:
            figures.save(figure, folder / key)
    files.write_text(folder / "bench.md", page.page_text(result))
    files.write_json(folder / "bench.json", result)  # Last: its sections are not measured again.
