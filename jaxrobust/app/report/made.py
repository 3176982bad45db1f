"""Tabulates how the numbers of a study were made: runs, provenance and configurations."""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxrobust.app.measurements import named_results
from jaxrobust.app.report.page import Table, duration, text_row
from jaxrobust.app.study.read import Run, Study


def tables(study: Study) -> tuple[Table, ...]:
    """Tabulates what made the numbers of a study."""
    found = (common_provenance_table(study), run_table(study), other_measurements_table(study),
             *configuration_tables(study))
    return tuple(filter(None, found))


def run_table(study: Study) -> Table:
    """Tabulates each run's seed, the epoch kept, and the provenance in which runs differ."""
    described = {(row, run.seed): _provenance(run) for row in study.labels
                 for run in study.runs[row] if run.provenance}
    fields = _differing(described.values())
    rows = []
    for row in study.labels:
        for run in study.runs[row]:
            values = described.get((row, run.seed), {})
            kept = (run.evaluation or {}).get("epoch")
            cells = [str(run.seed) if run.config else "–", "–" if kept is None else str(kept),
                     run.provenance.get("started", "–"),
                     duration(run.provenance["seconds"]) if "seconds" in run.provenance else "–",
                     *(values.get(field, "–") for field in fields)]
            rows.append(text_row(study.labels[row], cells))
    return Table("Runs: what made each number.",
                 ("Method", "Seed", "Epoch kept", "Started", "Training time", *fields),
                 tuple(rows), note="How to read: a line for each training. A dash: not available.",
                 numeric=False)


def other_measurements_table(study: Study) -> Table | None:
    """Lists measurements with a name, which the report does not show; None if there are none."""
    rows = [text_row(study.labels[row], (str(run.seed), ", ".join(named)))
            for row in study.labels for run in study.runs[row]
            if (named := named_results(run.folder))]
    if not rows:
        return None
    return Table("Other measurements, with other settings.", ("Method", "Seed", "Files"),
                 tuple(rows), note="How to read: made with --name, in the folder of the run; this "
                 "report shows those without a name.", numeric=False)


def common_provenance_table(study: Study) -> Table:
    """Tabulates the provenance that all runs share, and the study's own command and commit."""
    described = [_provenance(run) for runs in study.runs.values() for run in runs
                 if run.provenance]
    differing = _differing(described)
    common = {field: value for values in described[:1] for field, value in values.items()
              if field not in differing}
    for field, value in (("Command", study.command), ("Commit", study.commit)):
        if common.get(field) != value:
            common[f"{field} of the {'report' if study.name == 'runs' else 'study'}"] = value
    return Table("Common to all runs.", ("What", "Value"),
                 tuple(text_row(name, [value]) for name, value in common.items()),
                 numeric=False)


def _provenance(run: Run) -> dict[str, str]:
    versions = ", ".join(f"{name} {v}" for name, v in run.provenance["versions"].items())
    return {"Command": run.provenance["command"], "Commit": run.provenance["commit"],
            "Hardware": run.provenance["hardware"], "Platform": run.provenance["platform"],
            "Versions": versions}


def _differing(described: Iterable[dict[str, str]]) -> list[str]:
    """Returns the keys whose values are not the same everywhere, in the order of the first."""
    described = list(described)
    return [key for key in (described[0] if described else ())
            if len({values[key] for values in described}) > 1]


def configuration_tables(study: Study) -> tuple[Table, ...]:
    """Tabulates the fields in which rows differ, and those that they share."""
    by_row = {row: _row_configuration(runs) for row, runs in study.runs.items()
              if any(run.config for run in runs)}
    differing = _differing(by_row.values())
    rows = tuple(text_row(study.labels[row], (values[field] for field in differing))
                 for row, values in by_row.items())
    first = next(iter(by_row.values()), {})
    common = tuple(text_row(field, [value]) for field, value in first.items()
                   if field not in differing)
    return (
        Table("Configuration: the fields in which the rows differ.", ("Method", *differing), rows,
              note="How to read: names as in config.json of each run; the seed is left out.",
              numeric=False),
        Table("Configuration: the fields that all rows share.", ("Field", "Value"), common,
              numeric=False, folded=True))


def _row_configuration(runs: Sequence[Run]) -> dict[str, str]:
    """Returns a row's settings; every value of those in which its seeds differ."""
    flat = [_flatten(dataclasses.asdict(run.config)) for run in runs if run.config]
    return {field: " / ".join(dict.fromkeys(values[field] for values in flat))
            for field in flat[0] if field != "seed"}


def _flatten(values: dict, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (tuple, list)):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = str(value)
    return flat
