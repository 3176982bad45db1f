"""``bench train``: the losses, a training step and the programs of runs, in time and memory.

    python -m experiments bench

In sections, each written when it is done:

- a: the robust loss with its gradients, against a looping and a vectorised form in PyTorch;
- b: a step of ``robust`` against one of ``both``;
- c: a step of ResNet18 against PyTorch's, eager, channels-last and compiled;
- d: the share of the device's measured arithmetic peak that a step achieves;
- e: one run against several seeds in one program;
- f: the host's part of an update, and several updates in a call;
- g: how the loss's cost grows with C, d and B, and a step over several devices;
- h: the time to the first step, with and without a filled compilation cache;
- i: an epoch, and what 200 of them would take (accelerators only).

Every comparison is a ratio of times taken in turn, in one run on one machine.
"""

import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

from experiments.bench import losses, programs, timing, train_page, train_step
from jaxrobust import _validate
from jaxrobust.app import files, provenance
from jaxrobust.app.progress import progress
from jaxrobust.app.report import figures


class Settings(NamedTuple):
    """Of the modules that measure."""

    losses: losses.Settings
    train_step: train_step.Settings
    programs: programs.Settings


class Section(NamedTuple):
    """Of the benchmark."""

    measure: Callable[[Settings, programs.Done], dict]
    settings: tuple[str, ...]  # the fields of Settings that decide it


def _scaling(settings: Settings, done: programs.Done) -> dict:
    return {"scaling": losses.measure_scaling(settings.losses, done),
            **programs.measure_devices(settings.programs, done)}


SECTIONS: dict[str, Section] = {
    "a": Section(lambda s, done: losses.measure_losses(s.losses, done), ("losses",)),
    "b": Section(lambda s, _: train_step.measure_methods(s.train_step), ("train_step",)),
    "c": Section(lambda s, _: train_step.measure_peers(s.train_step), ("train_step",)),
    "d": Section(lambda s, _: train_step.measure_peak(s.train_step), ("train_step",)),
    "e": Section(lambda s, done: programs.measure_seeds(s.programs, done), ("programs",)),
    "f": Section(lambda s, done: programs.measure_host(s.programs, done), ("programs",)),
    "g": Section(_scaling, ("losses", "programs")),
    "h": Section(lambda s, done: programs.measure_start(s.programs, done), ("programs",)),
    "i": Section(lambda s, done: programs.measure_epoch(s.programs, done), ("programs",)),
}
"""By letter."""


def settings_for(platform: str, *, quick: bool) -> Settings:
    """The settings on a platform, "cpu" or another; ``quick`` only shows that it works."""
    return Settings(losses.QUICK if quick else losses.Settings(),
                    train_step.QUICK if quick else train_step.Settings(),
                    programs.settings_for(platform, quick=quick))


def measure(folder: pathlib.Path, *, quick: bool = False, only: Sequence[str] | None = None) -> str:
    """Writes ``bench.json``, ``bench.md`` and two figures, after every section.

    A section that is there with the same settings is kept, unless ``only`` names it.

    Args:
      folder: of the results.
      quick: whether it is only to show that everything works.
      only: letters of sections; none for all.

    Returns:
      The table of ratios.

    Raises:
      InputError: (a ValueError) for an unknown section, or if the folder holds something else.
    """
    for letter in only or ():
        _validate.one_of("section", letter, SECTIONS)
    settings = settings_for(jax.default_backend(), quick=quick)
    described = {"benchmark": "train", "quick": quick}
    files.claim(folder, "settings.json", json.dumps(described, indent=2) + "\n")
    path = folder / "bench.json"
    done = files.read_json(path)["sections"] if path.is_file() else {}
    wanted = {letter: _plain(settings, section) for letter, section in SECTIONS.items()}
    missing = [letter for letter in only or SECTIONS
               if only or done.get(letter, {}).get("settings") != wanted[letter]]
    result = _result(described, done)
    with progress("bench train", len(missing)) as shown:
        for letter in missing:
            done[letter] = _measure_section(
                SECTIONS[letter], settings, wanted[letter],
                lambda name, seconds, letter=letter: shown.show(
                    **{f"({letter}) seconds of {name}": seconds}))
            result = _result(described, done)
            _write(folder, result)
            shown.advance()
    _write(folder, result)
    return train_page.ratio_table(result["ratios"])


def _plain(settings: Settings, section: Section) -> Any:
    """The settings of a section as JSON has them."""
    return json.loads(json.dumps({
        name: dataclasses.asdict(getattr(settings, name)) for name in section.settings}))


def _measure_section(section: Section, settings: Settings, described: Any,
                     done: programs.Done) -> dict:
    jax.clear_caches()  # What is compiled here does not depend on the sections before.
    made, load, start = provenance.describe(), timing.load_average(), time.perf_counter()
    measured = section.measure(settings, done)
    if importlib.util.find_spec("torch") is not None:
        made["versions"]["torch"] = metadata.version("torch")
    return {"settings": described, "result": measured, "provenance": made | {
        "cores": timing.cores(), "load_average": [load, timing.load_average()],
        "seconds": time.perf_counter() - start}}


def _result(described: Mapping, sections: Mapping[str, dict]) -> dict:
    """The content of ``bench.json``."""
    ordered = {letter: sections[letter] for letter in SECTIONS if letter in sections}
    measured = {letter: section["result"] for letter, section in ordered.items()}
    return {**described, "ratios": train_page.ratios(measured), "sections": ordered}


def _write(folder: pathlib.Path, result: Mapping) -> None:
    if "g" in result["sections"]:
        measured = result["sections"]["g"]["result"]
        figures.save(train_page.scaling_figure(measured["scaling"]), folder / "scaling")
        figures.save(train_page.devices_figure(measured["cases"]), folder / "devices")
    files.write_text(folder / "bench.md", train_page.page_text(result))
    files.write_json(folder / "bench.json", result)  # Last: what it holds is not measured again.
