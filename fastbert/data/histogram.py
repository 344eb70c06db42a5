"""How long rows and documents are: exact counts, shown as bars for powers of two."""

from collections import Counter
from pathlib import Path

import numpy as np

_WIDTH = 40


class Lengths:
    """How often each length (a positive number of tokens) occurs."""

    def __init__(self, counts: dict[int, int] | None = None):
        self.counts = Counter(counts)

    def add(self, lengths: np.ndarray) -> None:
        values, counts = np.unique(lengths, return_counts=True)
        self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def summary(self) -> dict:
        """Number, mean, median, 90th and 99th percentile, the longest, and the bins [shortest, longest, number] from
        powers of two to the next, from the first that is not empty to the last."""
        values = np.array(sorted(self.counts), np.int64)
        counts = np.array([self.counts[value] for value in values.tolist()], np.int64)
        upto = np.cumsum(counts)
        number = int(upto[-1])

        def quantile(share: float) -> int:
            return int(values[np.searchsorted(upto, share * number)])

        first, last = int(values[0]).bit_length() - 1, int(values[-1]).bit_length() - 1
        power = (
            np.bincount([value.bit_length() - 1 for value in values.tolist()], counts, last + 1).astype(int).tolist()
        )
        return {
            "number": number,
            "mean": round(float(values @ counts) / number, 2),
            "median": quantile(0.5),
            "percentile_90": quantile(0.9),
            "percentile_99": quantile(0.99),
            "longest": int(values[-1]),
            "bins": [[1 << k, (2 << k) - 1, power[k]] for k in range(first, last + 1)],
        }


def bars(title: str, summary: dict) -> list[str]:
    """Lines of text that show a summary."""
    figures = "mean {mean:,.1f}, median {median:,}, 90 % up to {percentile_90:,}, 99 % up to {percentile_99:,}"
    lines = [f"{title}: {figures}, longest {{longest:,}}".format(**summary)]
    most = max(count for _, _, count in summary["bins"])
    names = [_bin_name(low, high) for low, high, _ in summary["bins"]]
    wide = max(map(len, names))
    for name, (_, _, count) in zip(names, summary["bins"], strict=True):
        bar = "█" * round(_WIDTH * count / most) or "▏" * bool(count)
        lines.append(f"  {name:>{wide}} {bar:<{_WIDTH}} {count:,}")
    return lines


def draw(path: Path, summaries: dict[str, dict]) -> None:
    """Write a picture (PNG) of summaries by the plural of what is counted, side by side. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(summaries), 3.6), dpi=120)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.065, right=0.975, top=0.91, bottom=0.2, wspace=0.17)
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, (name, summary) in zip(panels, summaries.items(), strict=True):
        bins = summary["bins"]
        shares = [100 * count / summary["number"] for _, _, count in bins]
        axes.bar(range(len(bins)), shares, width=0.94, align="edge", color="#4472a8")
        edges = [low for low, _, _ in bins] + [bins[-1][1] + 1]
        axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges], fontsize=8, rotation=45)
        for title, place, color in (("median", "median", "#e07b00"), ("99 %", "percentile_99", "#404040")):
            at = np.log2(summary[place] / edges[0])
            axes.axvline(at, color=color, linestyle="--", linewidth=1.4, label=f"{title}: {summary[place]:,}")
        axes.set_title(f"{summary['number']:,} {name}", fontsize=10)
        axes.set_xlabel(f"tokens per {name[:-1]}", fontsize=9)
        axes.set_ylabel(f"per cent of {name}", fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _bin_name(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"
