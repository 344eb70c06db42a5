"""Plots of comparisons (see report.py), as PNG: time against length for each provider, and percent of the floor.

    time against length   one file per device, op and dtype, one panel per mode, from one run. Only cases that differ in
                          nothing but length, with as many sequences as fit into the same number of tokens
    percent of the floor  one file per device and dtype: our fastest provider beside the best other one

Ours are blue in every plot, the others muted; what cannot be compared is dotted, the floor is dashed.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert.errors import MissingDependencyError

from .harness import OURS
from .rows import file_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Comparison

DPI = 130
BLUE, GRAY, DARK = "#0b5fc0", "#a9adb3", "#333333"
MUTED = ("#8d9199", "#c09a5b", "#7fa383", "#a988ad", "#c4857f", "#6fa3a8", "#9a8f6a", "#b3a3c9")
MARKERS = "sDv^P<X>"
MODES = ("fwd", "bwd", "fwd+bwd", "step")


@dataclass(frozen=True)
class Plot:
    """What becomes the file `name`: draw(comparisons, title)."""

    name: str
    title: str
    comparisons: Sequence["Comparison"]
    draw: Callable[[Sequence["Comparison"], str], "Figure"]

    @property
    def source(self) -> str:
        """Stands for the rows; the file says it, so that one drawn from other rows is known."""
        rows = [found.rows for found in self.comparisons]
        return "rows " + hashlib.sha256(json.dumps([self.title, rows], sort_keys=True).encode()).hexdigest()

    def is_drawn(self, path: Path) -> bool:
        """Whether the file is there and was drawn from these rows."""
        return path.is_file() and self.source.encode() in path.read_bytes()


def write(plots: Iterable[Plot], folder: Path) -> Iterator[Path]:
    """Draw the plots into the folder. Raises MissingDependencyError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("plots need the package matplotlib: pip install fastbert-kernels[plot]")
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        figure = plot.draw(plot.comparisons, plot.title)
        figure.savefig(folder / plot.name, dpi=DPI, metadata={"Software": None, "Description": plot.source})
        yield folder / plot.name


def lengths(comparisons: Iterable["Comparison"]) -> list[Plot]:
    """Time against length, where the newest run that has several lengths has them. Comparisons: of all runs, oldest
    first."""
    by_run = defaultdict(lambda: defaultdict(list))
    for found in comparisons:
        by_run[found["device"], found["op"], found["dtype"]][found["run"]].append(found)
    plots = []
    for (device, op, dtype), runs in by_run.items():
        series = next((s for s in map(_series, reversed(runs.values())) if len(_lengths(s)) > 1), None)
        if series:
            first = series[0]
            tokens = max(found["shape"]["B"] * found["shape"]["L"] for found in series)
            batch = f"{tokens} tokens a batch, {sizes(_others(first))}"
            title = f"{op}, {dtype}, {device}\n{batch}\n{first['commit']}, {first['date']}"
            plots.append(Plot(_name(device, op, dtype), title, series, _draw_lengths))
    return plots


def floors(comparisons: Iterable["Comparison"]) -> list[Plot]:
    """Percent of the floor, for the comparisons given: one case of each op."""
    by_file = defaultdict(list)
    for found in comparisons:
        if found.ours and found.ours["percent_of_floor"] is not None:
            by_file[found["device"], found["dtype"]].append(found)
    plots = []
    for (device, dtype), bars in by_file.items():
        when = ", ".join(sorted({f"{found['commit']}, {found['date']}" for found in bars}))
        title = f"percent of the floor, {dtype}, {device}\n{when}"
        plots.append(Plot(_name(device, "floor", dtype), title, bars, _draw_floors))
    return plots


def duration(us: float) -> str:
    """A time with three digits and its unit."""
    unit, size = next((unit, size) for unit, size in (("s", 1e6), ("ms", 1e3), ("us", 0)) if us >= size)
    value = us / (size or 1)
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def sizes(shape: dict) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def _name(device: str, what: str, dtype: str) -> str:
    return f"{Path(file_name(device)).stem}-{what}-{dtype}.png"


def _others(found: "Comparison") -> dict:
    return {name: size for name, size in found["shape"].items() if name not in ("B", "L")}


def _lengths(series: Iterable["Comparison"]) -> list[int]:
    return sorted({found["shape"]["L"] for found in series})


def _series(comparisons: Iterable["Comparison"]) -> list["Comparison"]:
    """Those with the most lengths among which B is as many sequences as fit into one number of tokens, and every other
    size is the same."""
    families = defaultdict(list)
    for found in comparisons:
        if {"B", "L"} <= set(found["shape"]):
            families[json.dumps(_others(found), sort_keys=True)].append(found)
    candidates = []
    for family in families.values():
        for tokens in sorted({found["shape"]["B"] * found["shape"]["L"] for found in family}, reverse=True):
            fitting = [found for found in family if found["shape"]["B"] == tokens // found["shape"]["L"]]
            candidates.append(fitting)
    return max(candidates, key=lambda series: len(_lengths(series)), default=[])


def _draw_lengths(series: Sequence["Comparison"], title: str) -> "Figure":
    from matplotlib.figure import Figure

    modes = sorted({found["mode"] for found in series}, key=MODES.index)
    figure = Figure(figsize=(3 * len(modes) + 3.4, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    styles = _styles({row["provider"]: row["comparable"] for found in series for row in found.rows})
    for axes, mode in zip(panels, modes, strict=True):
        found = sorted((f for f in series if f["mode"] == mode), key=lambda f: f["shape"]["L"])
        for provider, style in styles.items():
            _draw_provider(axes, provider, style, found)
        axes.plot(_lengths(found), [f["floor_us"] for f in found], color=DARK, linestyle="--", label="floor", zorder=1)
        axes.set_title(mode, fontsize=10)
        _label_axes(axes, _lengths(series))
    panels[0].set_ylabel("time (median; band: p20 to p80)", fontsize=9)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _styles(comparable: dict[str, bool]) -> dict[str, dict]:
    """How each provider is drawn: ours first and in blue, the others by name."""
    ours = sorted((name for name in comparable if name.startswith(OURS)), reverse=True)  # triton, torch, cuda
    styles = {}
    for name, face in zip(ours, cycle((BLUE, "white")), strict=False):
        styles[name] = {"color": BLUE, "marker": "o", "markerfacecolor": face, "linewidth": 2.4, "zorder": 4}
    for name, color, marker in zip(sorted(set(comparable) - set(ours)), cycle(MUTED), cycle(MARKERS), strict=False):
        dotted = "-" if comparable[name] else ":"
        styles[name] = {"color": color, "marker": marker, "linestyle": dotted, "linewidth": 1.3, "zorder": 3}
    return {name: {"markersize": 5, **style} for name, style in styles.items()}


def _draw_provider(axes: "Axes", provider: str, style: dict, comparisons: Sequence["Comparison"]) -> None:
    rows = [(found["shape"]["L"], row) for found in comparisons for row in found.rows if row["provider"] == provider]
    if rows:
        x = [length for length, _ in rows]
        low, middle, high = ([row[name] for _, row in rows] for name in ("p20_us", "p50_us", "p80_us"))
        dotted = " (not comparable)" if style.get("linestyle") == ":" else ""
        axes.plot(x, middle, label=provider + dotted, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0, zorder=2)


def _label_axes(axes: "Axes", ticks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("length L", fontsize=9)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g} us" if us < 1e3 else f"{us / 1e3:g} ms"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_floors(bars: Sequence["Comparison"], title: str) -> "Figure":
    from matplotlib.figure import Figure

    by_case = defaultdict(list)
    for found in bars:
        by_case[f"{found['op']}   {sizes(found['shape'])}"].append(found)
    figure = Figure(figsize=(8.6, 0.42 * len(bars) + 0.34 * len(by_case) + 1.3), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    axes = figure.add_subplot()
    y, ticks = 0.0, {}
    for case, comparisons in by_case.items():
        axes.text(0, y, case, transform=axes.get_yaxis_transform(), fontsize=9, weight="bold", va="center")
        y += 0.7
        for found in comparisons:
            _draw_bar(axes, y - 0.19, found.ours, BLUE, "white")
            ticks[y - 0.19] = f"{found['mode']}   {found.ours['provider']}"
            if found.rival:
                _draw_bar(axes, y + 0.19, found.rival, GRAY, DARK)
                ticks[y + 0.19] = found.rival["provider"]
            y += 1
        y += 0.1
    percents = [row["percent_of_floor"] for found in bars for row in (found.ours, found.rival) if row]
    axes.axvline(100, color=DARK, linestyle="--", linewidth=1, zorder=1)
    axes.set(xlim=(0, 1.03 * max(100, *percents)), ylim=(y - 0.4, -0.5))
    axes.set_xlabel("percent of the floor (dashed: 100)", fontsize=9)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_bar(axes: "Axes", y: float, row: dict, color: str, ink: str) -> None:
    """A bar with its figures: inside where there is room."""
    percent = row["percent_of_floor"]
    inside = percent > 40
    axes.barh(y, percent, height=0.36, color=color, zorder=2)
    how = {"ha": "right", "color": ink} if inside else {"ha": "left", "color": DARK}
    label = f" {percent:.0f} %, {duration(row['p50_us'])} "
    axes.text(percent, y, label, fontsize=7.5, va="center_baseline", zorder=3, **how)
