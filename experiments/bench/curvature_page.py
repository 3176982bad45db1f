"""The tables and figures of ``bench curvature``, from its numbers."""

import itertools
from collections.abc import Mapping, Sequence

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench import markdown
from jaxrobust.app.report.figures import row_style
from jaxrobust.app.report.page import significant

LABELS = {
    "spectrum": "exact spectrum",
    "eq21": "Eq. 21",
    "eq21_one": "Eq. 21, one probe",
    "eq21_marginal": "Eq. 21, a further probe",
    "frobenius": "exact products",
    "frobenius_one": "exact products, one probe",
    "frobenius_marginal": "exact products, a further probe",
    "torch": "Eq. 21 in PyTorch",
    "torch_channels_last": "Eq. 21 in PyTorch, channels last",
}
"""What a contender is called."""

SIZES = {"num_classes": "Number of classes C", "image_size": "Image size [pixels]",
         "width": "Width of the network"}
"""What a size is called that a figure or table varies."""

CONTENDERS = ("spectrum", "eq21", "frobenius")
"""Those measured everywhere."""

_MIB = 2**20


def page_text(result: Mapping, swept: Mapping[str, Sequence[Mapping]]) -> str:
    """The page.

    Args:
      result: the content of ``bench.json``.
      swept: by the size that varies, the cases of it.
    """
    settings, provenance = result["settings"], result["provenance"]
    parts = [
        "# Curvature: time and memory",
        "ResNet18 (128 features, random weights, batch norm in evaluation mode) on "
        f"{settings['image_size']} x {settings['image_size']} x 3 images, "
        f"C = {settings['num_classes']}, K = {settings['num_probes']} probes, unless a table says "
        f"otherwise. Times: {settings['rounds']} rounds, every contender in turn in each, after "
        "compiling and one untimed call; ratios are those of the medians. “Exact spectrum” is "
        "`piecewise_linear_spectrum`, “exact products” is `squared_frobenius`, “Eq. 21” is "
        "`finite_difference_curvature`.",
        "## Ratios",
        ratio_table(result),
        "A further probe: (time with K probes − time with one) / (K − 1). Range: the smallest and "
        f"largest ratio of a single round. PyTorch: {result['torch']}.",
        "## Times of the comparison",
        _comparison(result),
        _load_text(provenance),
        "Milliseconds per image: median [quartiles]." + _threads_text(result),
        "## Cost against C, image size and width",
        "![Three panels with logarithmic axes: milliseconds per image against the number of "
        "classes, the image size and the width of the network, a line each for the exact "
        "spectrum, Eq. 21 and exact products. The tables hold the numbers.](cost.png)",
        *(_sweep(name, cases) for name, cases in swept.items()),
        _crossover_text(result),
        "## Memory against the number of probes",
        "![Working memory in MiB against the number of probes, a line each for exact products "
        "and Eq. 21. The table holds the numbers.](memory.png)",
        _memory(result["memory"]),
        _memory_text(result),
        "## Provenance",
        markdown.provenance(provenance),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ratio_table(result: Mapping) -> str:
    """Every ratio, its target, and whether it is met."""
    rows = []
    for row in result["ratios"]:
        head = (f"{LABELS[row['numerator']]} / {LABELS[row['denominator']]}",
                row["width"], row["batch_size"])
        target = f"{row['bound']} {row['target']:g}"
        if "not_measured" in row:
            rows.append((*head, "–", "–", target, "not measured"))
        else:
            rows.append((*head, f"{row['ratio']:.2f}",
                         f"{row['smallest']:.2f} to {row['largest']:.2f}", target,
                         "met" if row["met"] else "not met"))
    return markdown.table(
        ("Time of", "Width", "Images at once", "Ratio", "Range", "Target", ""), rows)


def cost_figure(swept: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Milliseconds per image of the three contenders, a panel for each size that varies."""
    figure = _figure(11, 4.4)
    panels = figure.subplots(1, len(swept), sharey=True, squeeze=False)[0]
    for ax, (name, cases) in zip(panels, swept.items(), strict=True):
        sizes = [case[name] for case in cases]
        for index, contender in enumerate(CONTENDERS):
            times = [case["ms_per_image"][contender] for case in cases]
            _line(ax, index, sizes, [time["median"] for time in times], yerr=[
                [time["median"] - time["lower_quartile"] for time in times],
                [time["upper_quartile"] - time["median"] for time in times]])
        ax.set_yscale("log")
        _ticks(ax, sizes)
        ax.set_xlabel(SIZES[name])
        ax.set_title(_fixed(name, cases), fontsize=10)
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    panels[0].set_ylabel("Time [ms per image]")
    _legend(figure, panels[0])
    return figure


def memory_figure(memory: Sequence[Mapping]) -> Figure:
    """Working memory against the number of probes; from 0, so that flat looks flat."""
    figure = _figure(6, 4.2)
    ax = figure.subplots()
    probes = [row["num_probes"] for row in memory]
    for index, contender in enumerate(CONTENDERS):
        if contender in memory[0]:
            _line(ax, index, probes, [row[contender] / _MIB for row in memory])
    _ticks(ax, probes)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("Number of probes K")
    ax.set_ylabel("Working memory [MiB]")
    _legend(figure, ax)
    return figure


def _comparison(result: Mapping) -> str:
    cases = [case for case in result["cases"] if "eq21_one" in case["ms_per_image"]]
    names = [name for name in LABELS if name in cases[0]["ms_per_image"]]
    return markdown.table(
        ("Contender", *(f"Width {case['width']}, {case['batch_size']} images" for case in cases)),
        [(LABELS[name], *(_time(case, name) for case in cases)) for name in names])


def _load_text(provenance: Mapping) -> str:
    before = provenance["load_average"][0]
    if before is None or before <= provenance["cores"] / 2:
        return ""
    return (f"**The machine was busy before it began (load {before:g} on {provenance['cores']} "
            "cores): these times are disturbed.**")


def _threads_text(result: Mapping) -> str:
    threads = sorted({number for case in result["cases"]
                      for number in case["torch_threads"].values()})
    return f" PyTorch ran on {' or '.join(map(str, threads))} thread(s)." if threads else ""


def _sweep(name: str, cases: Sequence[Mapping]) -> str:
    head = (SIZES[name], "Images at once", *(f"{LABELS[c]} [ms]" for c in CONTENDERS),
            *(f"{LABELS[c]} [MiB]" for c in CONTENDERS), "compiling the spectrum [s]")
    return markdown.table(head, [
        (case[name], case["batch_size"], *(_time(case, c) for c in CONTENDERS),
         *(significant(case["temp_bytes"][c] / _MIB) for c in CONTENDERS),
         f"{case['compile_seconds']['spectrum']:.1f}")
        for case in cases])


def _crossover_text(result: Mapping) -> str:
    classes = result["settings"]["classes"]
    said = []
    for name, at in result["crossover"].items():
        what = f"{LABELS[name]} with K = {result['settings']['num_probes']}"
        said.append(
            f"{what} is slower than the exact spectrum up to C = {classes[-1]}, the largest "
            "measured." if at is None else
            f"{what} is cheaper than the exact spectrum already at C = {classes[0]}, the "
            "smallest measured." if at <= classes[0] else
            f"{what} is cheaper than the exact spectrum from about C = {at:.0f} on "
            "(interpolated between the measured ones).")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def _memory(memory: Sequence[Mapping]) -> str:
    names = [name for name in CONTENDERS if name in memory[0]]
    return markdown.table(("Probes", *(f"{LABELS[name]} [MiB]" for name in names)), [
        (row["num_probes"], *(significant(row[name] / _MIB) for name in names))
        for row in memory])


def _memory_text(result: Mapping) -> str:
    memory = result["memory"]
    growth = "; ".join(
        f"from {first['num_probes']} to {last['num_probes']} probes " + ", ".join(
            f"{LABELS[name]} × {last[name] / first[name]:.2f}"
            for name in CONTENDERS if name in first)
        for first, last in itertools.pairwise(memory))
    return ("Working memory of the compiled program, images and weights not counted. It changes "
            f"{growth}.")


def _time(case: Mapping, contender: str) -> str:
    time = case["ms_per_image"][contender]
    return (f"{significant(time['median'])} [{significant(time['lower_quartile'])}–"
            f"{significant(time['upper_quartile'])}]")


def _fixed(name: str, cases: Sequence[Mapping]) -> str:
    words = {"num_classes": "C = {}", "image_size": "{0} x {0} pixels", "width": "width {}"}
    return ", ".join(text.format(cases[0][other]) for other, text in words.items()
                     if other != name)



def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def _line(ax: Axes, index: int, x: Sequence[float], y: Sequence[float], yerr=None) -> None:
    style = row_style(index)
    ax.errorbar(x, y, yerr=yerr, color=style.color, marker=style.marker, linestyle=style.dashes,
                markersize=6, linewidth=1.5, capsize=3, markeredgecolor="white",
                markeredgewidth=0.6, label=LABELS[CONTENDERS[index]])


def _ticks(ax: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis that names the values measured, but not two that would overlap."""
    ax.set_xscale("log")
    ax.set_xlim(values[0] / 1.25, values[-1] * 1.25)
    named = values[:1]
    for value in values[1:]:
        if value > 1.35 * named[-1]:
            named = [*named, value]
    ax.set_xticks(named, [str(value) for value in named])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_axisbelow(True)
    ax.grid(color="#D9D9D9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
