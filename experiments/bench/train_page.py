"""The tables and figures of ``bench train``, from its numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.bench import markdown
from experiments.bench.programs import PHASES, to_first_step
from jaxrobust.app.report.figures import Style, add_legend, new_figure, row_style
from jaxrobust.app.report.page import duration, significant

_LABELS = {
    "ours": "JAX",
    "jax": "JAX",
    "looping": "PyTorch, looping",
    "vectorised": "PyTorch, vectorised",
    "torch": "PyTorch",
    "torch_channels_last": "PyTorch, channels last",
    "torch_compiled": "PyTorch, compiled",
    "both": "`both`",
    "robust": "`robust`",
    "robust_one_pass": "`robust`, one pass",
}

_PHASES = {
    "start": "start of Python", "import": "imports", "data": "data set",
    "state": "initial state, images on the device", "lower": "tracing and lowering",
    "compile": "compiling", "first": "first step", "second": "second step",
}

_SIZES = {"num_classes": "Number of classes C", "dim": "Dimension of the features d",
          "batch_size": "Batch size B"}
_SHORT = {"num_classes": "C", "dim": "d", "batch_size": "B"}

_MIB = 2**20


def ratios(measured: Mapping[str, Mapping]) -> list[dict]:
    """Every ratio of the sections' results: ``section, numerator, denominator, case``, with
    ``ratio, smallest, largest`` or ``not_measured``, and ``bound, target, met`` if it has one."""
    rows = []
    for letter, result in measured.items():
        if letter == "a":
            found = [row | {"case": _sizes(size)} for size in result["sizes"]
                     for row in size["ratios"]]
        elif letter in ("b", "c"):
            found = [row | {"case": _step_case(row)} for row in result["ratios"]]
        elif letter == "d":
            found = [{"numerator": "(operations per second) a step",
                      "denominator": "the fastest matrix product", "case": _step_case(case),
                      "ratio": case["share"]} for case in result["cases"]]
        else:
            found = result.get("ratios", [])
        rows += [{"section": letter, **row} for row in found]
    return rows


def ratio_table(rows: Sequence[Mapping]) -> str:
    """Every ratio, its target, and whether it is met."""
    return markdown.table(("", "Times of", "Case", "Ratio", "Range", "Target", ""), [
        (row["section"], f"{_label(row['numerator'])} / {_label(row['denominator'])}", row["case"],
         significant(row["ratio"]) if "ratio" in row else "–", _range(row), *_verdict(row))
        for row in rows], left=3)


def page_text(result: Mapping) -> str:
    """The page, from the content of ``bench.json``."""
    parts = [
        "# Training: time and memory",
        "Every ratio is of medians of times taken in turn, in one run on one machine; its range "
        "is that of single rounds or, for the host's part in (f), of single calls. Times are "
        "medians [quartiles]. A ratio without a target is there to be known.",
        _disturbed(result["sections"]),
        "**A quick run: it shows that everything works, and its numbers say nothing.**"
        if result["quick"] else "",
        "## Ratios", ratio_table(result["ratios"]), _reasons(result["ratios"])]
    for letter, section in result["sections"].items():
        heading, words = _SECTIONS[letter]
        parts += [f"## ({letter}) {heading}", *words(section["result"], section["settings"])]
    parts += ["## Provenance", *_provenance(result["sections"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def scaling_figure(rows: Sequence[Mapping]) -> Figure:
    """Time and working memory of the loss against C, d and B, a column of panels for each."""
    sweeps = {name: [row for row in rows if row["sweep"] == name] for name in _SIZES}
    figure = new_figure(11, 6.4)
    panels = figure.subplots(2, len(sweeps), sharey="row", sharex="col")
    for column, (name, cases) in zip(panels.T, sweeps.items(), strict=True):
        sizes = [case[name] for case in cases]
        _line(column[0], row_style(0), sizes, [case["ms"] for case in cases])
        _line(column[1], row_style(1), sizes, [case["temp_bytes"] / _MIB for case in cases])
        for ax in column:
            _logarithmic(ax, sizes)
        column[0].set_title(", ".join(f"{_SHORT[other]} = {cases[0][other]}"
                                      for other in _SIZES if other != name), fontsize=10)
        column[1].set_xlabel(_SIZES[name])
    panels[0, 0].set_ylabel("Time [ms]")
    panels[1, 0].set_ylabel("Working memory [MiB]")
    return figure


def devices_figure(cases: Sequence[Mapping]) -> Figure:
    """Time of an update against the number of devices, a panel for each case."""
    names = list(dict.fromkeys(case["case"] for case in cases))
    styles = {"mesh": row_style(0), "pmap": row_style(1), "jit": row_style(5)}
    figure = new_figure(1 + 4.6 * len(names), 4.2)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        counts = sorted({case["devices"] for case in cases if case["case"] == name})
        for form, style in styles.items():
            found = [case for case in cases if case["case"] == name and case["form"] == form]
            times = [case["ms_per_update"] for case in found]
            if form == "jit":
                ax.axhline(times[0]["median"], color=style.color, linestyle=style.dashes,
                           linewidth=1.2)
            elif found:
                _line(ax, style, [case["devices"] for case in found], times)
        _named_ticks(ax, counts)
        ax.set_ylim(bottom=0)
        ax.set_title(name.replace("`", ""), fontsize=10)
        ax.set_xlabel("Number of devices")
        ax.set_ylabel("Time of an update [ms]")
    labels = {"mesh": "mesh", "pmap": "pmap", "jit": "jit, one device"}
    add_legend(figure, [
        Line2D([], [], color=style.color, linestyle=style.dashes, label=labels[form],
               marker="" if form == "jit" else style.marker) for form, style in styles.items()])
    return figure


def _losses(result: Mapping, settings: Mapping) -> list[str]:
    names = ("ours", "looping", "vectorised")
    return [
        "The robust loss alone, on random features: value, gradients by features, noisy features "
        f"and softmax layer, and the next centroids. {settings['losses']['rounds']} rounds.",
        markdown.table(("Size", *(f"{_label(name)} [ms]" for name in names),
                        "Working memory, JAX [MiB]", "PyTorch's threads"), [
            (_sizes(size), *(_time(size["ms"].get(name)) for name in names),
             significant(size["temp_bytes"] / _MIB),
             ", ".join(f"{number} ({form})" for form, number in size["torch_threads"].items())
             or "–") for size in result["sizes"]]),
        "" if result["torch"] == "measured" else f"PyTorch: {result['torch']}."]


def _steps(result: Mapping, _: Mapping) -> list[str]:
    names = list(dict.fromkeys(name for case in result["cases"]
                               for name in (*case["ms"], *case["not_measured"])))
    compiled = [name for name in names if name not in ("torch", "torch_channels_last")]
    table = markdown.table(
        ("Step of", *(f"{_label(name)} [ms]" for name in names),
         *(f"{_label(name)}, compiling [s]" for name in compiled)),
        [(_step_case(case), *(_time(case["ms"].get(name)) for name in names),
          *(significant(case["compile_seconds"][name]) if name in case["compile_seconds"] else "–"
            for name in compiled)) for case in result["cases"]])
    if "torch" not in result:
        return ["A step on a batch that is there, without reading or augmenting images.", table]
    return ["The same step of the method `normal`: forward, backward, SGD with Nesterov momentum.",
            table, f"PyTorch: {result['torch']}" + (
                f", on {result['torch_threads']} thread(s)." if result["torch_threads"] else ".")]


def _peak(result: Mapping, _: Mapping) -> list[str]:
    return [
        "A step of `normal`, against the fastest product of two square matrices in the same type.",
        markdown.table(("Step of", "Step [ms]", "Operations in a step [10⁹]", "Step [10¹²/s]",
                        "Matrix product [10¹²/s]", "Its size", "Share"), [
            (_step_case(case), significant(case["step_ms"]), significant(case["step_flops"] / 1e9),
             significant(case["step_flops_per_second"] / 1e12),
             significant(case["peak_flops"] / 1e12), case["peak_size"],
             f"{100 * case['share']:.0f} %") for case in result["cases"]])]


def _seeds(result: Mapping, _: Mapping) -> list[str]:
    return [markdown.table(
        ("Case", "Seeds", "Updates in a call", "One seed [ms]", "All seeds in one program [ms]",
         "One after the other [ms]"),
        [(case["case"], case["seeds"], case["steps_per_call"],
          *(_time(case["ms_per_update"][name]) for name in ("one", "together")),
          significant(case["seeds"] * case["ms_per_update"]["one"]["median"]))
         for case in result["cases"]]),
        "Milliseconds of an update of every seed; “one after the other” is computed: the seeds "
        "times one."]


def _host(result: Mapping, _: Mapping) -> list[str]:
    return [
        "The host is busy until a call returns; the result comes later. On a CPU the same cores "
        "compute meanwhile and may take the host's from it, so there the processor time of its "
        "thread is what counts.",
        markdown.table(("Case", "In a call", "Update [ms]", "until the call returns [ms]",
                        "processor time of the host's thread [ms]",
                        "First call, which compiles [s]"), [
            (case["case"], case["form"],
             *(_time(case["ms_per_update"][name]) for name in ("step", "returns", "thread")),
             significant(case["first_call_s"])) for case in result["cases"]], left=2),
        "On CPUs XLA's convolutions are slower inside compiled loops (jax#12868): the reason why "
        "updates there are called one by one, and unrolled where a call holds several."
        if any(case["form"].endswith("loop") for case in result["cases"]) else ""]


def _scaling(result: Mapping, _: Mapping) -> list[str]:
    sweeps = [markdown.table((_SIZES[name], "Time [ms]", "Working memory [MiB]"), [
        (row[name], _time(row["ms"]), significant(row["temp_bytes"] / _MIB))
        for row in result["scaling"] if row["sweep"] == name]) for name in _SIZES]
    shared = ("**The devices are views of the same cores: this is what the forms cost, and no "
              "speed-up.**" if result["shared_cores"] else "")
    return [
        "The robust loss with its gradients, alone:",
        "![Six panels with logarithmic axes: milliseconds and MiB of the robust loss against the "
        "number of classes, the dimension of the features and the batch size. The tables hold the "
        "numbers.](scaling.png)",
        *sweeps,
        "A whole update over several devices, the same batch split among them:",
        "![A panel for each case: milliseconds of an update against the number of devices, a line "
        "each for mesh and pmap, and a level one for jit on one device. The table holds the "
        "numbers.](devices.png)",
        shared,
        markdown.table(("Case", "Form", "Devices", "Update [ms]"), [
            (case["case"], case["form"], case["devices"], _time(case["ms_per_update"]))
            for case in result["cases"]], left=2)]


def _start(result: Mapping, _: Mapping) -> list[str]:
    rows = [(case["case"], kind, *(significant(case[kind][phase]) for phase in PHASES),
             significant(to_first_step(case[kind])))
            for case in result["cases"] for kind in ("cold", "warm")]
    return [
        "A process of its own for each line. Warm: with `JAX_COMPILATION_CACHE_DIR` set to a "
        "folder that the cold one filled, and `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0`. "
        "One round.",
        markdown.table(("Case", "Cache", *(f"{_PHASES[phase]} [s]" for phase in PHASES),
                        "to the first step [s]"), rows, left=2)]


def _epoch(result: Mapping, settings: Mapping) -> list[str]:
    if "not_measured" in result:
        return [f"Not measured: {result['not_measured']}."]
    epochs = settings["programs"]["epochs"]
    return [
        "Images resident on the device, without validation and checkpoints.",
        markdown.table(("Case", "Images", "Updates", "An epoch [s]",
                        f"{epochs} epochs, projected"), [
            (case["case"], case["images"], case["updates"], _time(case["seconds"]),
             duration(case["projected_s"])) for case in result["cases"]]),
        f"**A projection: the median epoch times {epochs}. Nothing was trained for so long.**"]


_SECTIONS: dict[str, tuple[str, Callable[[Mapping, Mapping], list[str]]]] = {
    "a": ("The robust loss against PyTorch", _losses),
    "b": ("A step of `robust` against one of `both`", _steps),
    "c": ("A step of ResNet18 against PyTorch", _steps),
    "d": ("Share of the arithmetic peak", _peak),
    "e": ("One seed against several in one program", _seeds),
    "f": ("The host's part, and several updates in a call", _host),
    "g": ("Cost against C, d, B and devices", _scaling),
    "h": ("Time to the first step", _start),
    "i": ("An epoch", _epoch),
}


def _provenance(sections: Mapping[str, Mapping]) -> list[str]:
    where = {letter: section["provenance"] for letter, section in sections.items()}

    def said(of):
        """What is the same for all sections once, and else for which it is."""
        letters: dict[str, list[str]] = {}
        for letter, each in where.items():
            letters.setdefault(str(of(each)), []).append(letter)
        return "; ".join(value if len(letters) == 1 else f"{value} ({', '.join(which)})"
                         for value, which in letters.items())

    return [
        markdown.table(("Section", "Started", "Seconds", "Load before", "Load after"), [
            (letter, each["started"].replace("T", " "), f"{each['seconds']:.0f}",
             *map(str, each["load_average"])) for letter, each in where.items()]),
        "Load: processes that ran or waited, over the last minute.",
        markdown.table(("", ""), [
            ("Command", said(lambda each: f"`{each['command']}`")),
            ("Commit", said(lambda each: each["commit"])),
            ("Hardware", said(lambda each: each["hardware"])),
            ("Cores used", said(lambda each: each["cores"])),
            ("Versions", said(lambda each: ", ".join(
                f"{k} {v}" for k, v in each["versions"].items()))),
            ("Seeds", "0; in (e) from 0 on. No time depends on them"),
        ], left=2)]


def _disturbed(sections: Mapping[str, Mapping]) -> str:
    # Only the first one's: what came before the others is the benchmark itself.
    for section in list(sections.values())[:1]:
        load, cores = section["provenance"]["load_average"][0], section["provenance"]["cores"]
        if load is not None and load > cores / 2:
            return (f"**The machine was busy before it began (load {load:g} on {cores} cores): "
                    "these times are disturbed.**")
    return ""


def _reasons(rows: Iterable[Mapping]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "not_measured" in row:
            what = f"({row['section']}) {_label(row['denominator'])}, {row['case']}"
            if row["section"] == "a":
                what = f"({row['section']}) {_label(row['numerator'])}, {row['case']}"
            reasons.setdefault(row["not_measured"], []).append(what)
    return "\n".join(f"- Not measured: {'; '.join(what)}. Why: {reason}."
                     for reason, what in reasons.items())


def _sizes(size: Mapping) -> str:
    return f"B = {size['batch_size']}, d = {size['dim']}, C = {size['num_classes']}"


def _step_case(case: Mapping) -> str:
    return f"ResNet18, width {case['width']}, batch {case['batch_size']}, {case['dtype']}"


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _range(row: Mapping) -> str:
    if "smallest" not in row:
        return "–"
    return f"{significant(row['smallest'])} to {significant(row['largest'])}"


def _verdict(row: Mapping) -> tuple[str, str]:
    target = f"{row['bound']} {row['target']:g}" if "target" in row else "–"
    if "not_measured" in row:
        return target, "not measured"
    return target, {True: "met", False: "not met", None: ""}[row.get("met")]


def _time(summary: Mapping | None) -> str:
    if summary is None:
        return "–"
    median, low, high = (significant(summary[name])
                         for name in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} [{low}–{high}]"



def _line(ax: Axes, style: Style, x: Sequence[float], values: Sequence) -> None:
    """A line of numbers, or of summaries with their quartiles."""
    bars = None
    if isinstance(values[0], Mapping):
        bars = [[time["median"] - time["lower_quartile"] for time in values],
                [time["upper_quartile"] - time["median"] for time in values]]
        values = [time["median"] for time in values]
    ax.errorbar(x, values, yerr=bars, color=style.color, marker=style.marker,
                linestyle=style.dashes, markersize=6, linewidth=1.5, capsize=3,
                markeredgecolor="white", markeredgewidth=0.6)


def _logarithmic(ax: Axes, sizes: Sequence[int]) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    _named_ticks(ax, sizes)
    ax.set_axisbelow(True)
    ax.grid(color="#D9D9D9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _named_ticks(ax: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis that names the values measured."""
    ax.set_xscale("log")
    ax.set_xlim(values[0] / 1.25, values[-1] * 1.25)
    ax.set_xticks(values, [str(value) for value in values])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
