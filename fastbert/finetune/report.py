"""What an evaluation has found, to read and to look at."""

import math
import unicodedata
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastbert.errors import MissingDependencyError

_COUNTED = 16  # labels of which the picture shows counts in its fields
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei")
_FONTS += ("WenQuanYi Zen Hei", "SimHei", "Microsoft YaHei", "PingFang SC", "Heiti SC", "Arial Unicode MS")


@dataclass
class Scores:
    """metrics: numbers by name. per_class: precision, recall, f1 and support of each label, or None. confusion: labels
    and how often each (rows) was taken for each (columns), or None.
    """

    metrics: dict[str, float]
    per_class: list[dict] | None = None
    confusion: tuple[list[str], np.ndarray] | None = None

    def __str__(self) -> str:
        """A table for the terminal; of labels that are not ASCII also their numbers, which a picture may have."""
        lines = ["  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())]
        if self.per_class:
            wide = max(5, *(_width(row["label"]) for row in self.per_class))
            lines += ["", f"{'label':<{wide}}  precision  recall      f1   support"]
            for row in self.per_class:
                numbers = f"{row['precision']:>9.4f} {row['recall']:>7.4f} {row['f1']:>7.4f} {row['support']:>9,}"
                lines.append(f"{pad(row['label'], wide)}  {numbers}")
        if self.confusion and not "".join(labels := self.confusion[0]).isascii():
            numbered = (f"{number} {label}" for number, label in enumerate(labels, start=1))
            lines += ["", f"labels by number: {', '.join(numbered)}"]
        return "\n".join(lines)

    def to_json(self) -> dict:
        """All of it as JSON has it, which has no nan: None stands for it."""
        labels, table = self.confusion or (None, None)
        table = None if labels is None else {"labels": labels, "counts": table.tolist()}
        metrics = {name: None if math.isnan(value) else value for name, value in self.metrics.items()}
        return {"metrics": metrics, "per_class": self.per_class, "confusion": table}

    def plot(self, path: Path) -> Path:
        """The confusion matrix as a picture (PNG), each row in shares of its sum: with counts in the fields, of many
        labels percents. Labels that no font at hand can write stand there by number: see __str__.
        MissingDependencyError without matplotlib."""
        if find_spec("matplotlib") is None:
            raise MissingDependencyError("the picture needs the package matplotlib: pip install fastbert-kernels[plot]")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure

        labels, table = self.confusion
        shown, font = _written(labels)
        count, counted = len(labels), len(labels) <= _COUNTED
        side = 2 + count * (0.6 if counted else 0.36) + 0.08 * max(map(len, shown))
        size = min(max(side + 1.5, 6), 40), min(max(side, 4.5), 40)
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        axes = figure.add_subplot()
        shares = table / np.maximum(table.sum(1, keepdims=True), 1)
        # By the root of the share, so that the few of a label that go wrong can be seen.
        picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        turned = 90 if max(map(len, shown)) > 3 and count > 2 else 0
        axes.set_xticks(range(count), shown, fontsize=9, rotation=turned, parse_math=False, **font)
        axes.set_yticks(range(count), shown, fontsize=9, parse_math=False, **font)
        for row, column in np.argwhere(table if counted else shares >= 0.005):
            share = shares[row, column]
            text = f"{table[row, column]:,}" if counted else f"{100 * share:.0f}"
            style = {"color": "white" if share > 0.4 else "black", "fontsize": 9 if counted else 8}
            axes.text(column, row, text, ha="center", va="center", **style)
        axes.set(xlabel="predicted", ylabel="true")
        right, total = np.trace(table), table.sum()
        axes.set_title(f"{right:,} of {total:,} right ({right / max(total, 1):.1%})", fontsize=11)
        label = "share of the true label" if counted else "share of the true label (in the fields: %)"
        figure.colorbar(picture, ax=axes, shrink=0.7, fraction=0.04, pad=0.02, format="{x:.0%}", label=label)
        FigureCanvasAgg(figure).print_png(path)
        return path


def _written(labels: list[str]) -> tuple[list[str], dict]:
    """Labels, shortened, as a font can write them, and that font; numbers from 1 if none can."""
    from matplotlib import font_manager

    needed = {ord(character) for label in labels for character in label}
    for name in _FONTS:
        try:
            path = font_manager.findfont(name, fallback_to_default=False)
        except ValueError:
            continue
        if needed <= font_manager.get_font(path).get_charmap().keys():
            return [f"{label[:23]}…" if len(label) > 24 else label for label in labels], {"fontfamily": name}
    return [f"{number}" for number in range(1, len(labels) + 1)], {}


def _width(text: str) -> int:
    """Columns in a terminal, where CJK characters take two."""

    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def pad(text: str, width: int) -> str:
    """`text` with spaces up to a width in columns of a terminal."""
    return text + " " * max(0, width - _width(text))
