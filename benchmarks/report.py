"""`fastbert bench report`: tables and plots from the rows, and no figure without a row behind it.

    fastbert bench report                             what was measured, device by device
    fastbert bench report --device H100 --ops lamb    some of it
    fastbert bench report --table status              one table, as the READMEs have it
    fastbert bench report --plots                     PNG files in benchmarks/results/plots
    fastbert bench report --update                    both READMEs: what stands between their markers, anew
    fastbert bench report --check                     the same, but only say what would change; exit 1 if anything would

In a README a line <!-- report: NAME --> and a line <!-- end --> hold the table NAME; the rest of the file is yours.

Rules: compared is only what took turns in one run. Of each device, op, shape, dtype and mode the newest run counts. A
rival that computes something else is shown but never the best other one. Rows of interpreted kernels, without a commit
or without a date are refused.
"""

import argparse
import difflib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from fastbert.errors import ConfigError, DataError, MissingFileError

from . import cli, plots, rows
from .harness import OURS, Case
from .models import CPU_SIZES
from .plots import duration, sizes
from .rows import FAILED, MEASURED, MISSING, WRONG

FILES = (rows.FOLDER.parent / "README.md", rows.RESULTS / "README.md")
OUT = "--out benchmarks/results"
GPUS = ("NVIDIA H100", "NVIDIA H200")  # listed as not yet measured until they have rows
FIGURE = re.compile(r"-|[\d.]+( us| ms| s)?")
MARKER, END = re.compile(r"<!-- report: (.*) -->"), "<!-- end -->"
CLAIM = ("commit", "date", "torch")  # what every row needs
FIGURES = "run shape dtype checked comparable timer p20_us p50_us p80_us floor_us floor_by percent_of_floor".split()
NOT_YET = "not yet measured"


@dataclass(frozen=True)
class Comparison:
    """Measured rows that took turns: of one run, device, op, shape, dtype and mode. found["dtype"] and every other
    column that they share is had by its name."""

    rows: Sequence[dict]

    def __getitem__(self, column: str):
        return self.rows[0][column]

    @property
    def ours(self) -> dict | None:
        """Our fastest that computes all of it."""
        return _fastest(row for row in self.rows if row["provider"].startswith(OURS) and row["comparable"])

    @property
    def rival(self) -> dict | None:
        """The fastest that is not ours, computes the same and was timed in the same way."""
        rivals = (row for row in self.rows if not row["provider"].startswith(OURS) and row["comparable"])
        return _fastest(row for row in rivals if self.ours is None or row["timer"] == self.ours["timer"])

    @property
    def others(self) -> list[dict]:
        """Those that compute something else or less."""
        return [row for row in self.rows if not row["comparable"]]

    def named(self, provider: str) -> list[dict]:
        return [row for row in self.rows if row["provider"] == provider]

    def ratio(self, row: dict | None) -> float | None:
        """How many times as fast the row is as the fastest rival, if both were timed in the same way."""
        same = row and self.rival and row["timer"] == self.rival["timer"]
        return self.rival["p50_us"] / row["p50_us"] if same else None


@dataclass(frozen=True)
class Results:
    """Rows, oldest first, and where their plots are; links to plots are relative to the folder `beside`."""

    rows: Sequence[dict]
    plots: Path
    beside: Path = Path()

    @property
    def devices(self) -> dict[str, bool]:
        """Every device that has rows, and whether it is a GPU."""
        return {row["device"]: row.get("threads") is None for row in self.rows}

    @property
    def all_comparisons(self) -> list[Comparison]:
        """Of all runs, oldest first."""
        found = defaultdict(list)
        for row in self.rows:
            if row["status"] == MEASURED and row.get("mode"):
                found[row["run"], _case(row)].append(row)
        return [Comparison(group) for group in found.values()]

    @property
    def comparisons(self) -> list[Comparison]:
        """The newest of each device, op, shape, dtype and mode; ops in the order of `fastbert bench`."""
        newest = {_case(found.rows[0]): found for found in self.all_comparisons}
        order = {op: place for place, op in enumerate(cli.OPS)}
        return sorted(newest.values(), key=lambda found: order.get(found["op"], len(order)))

    @property
    def headlines(self) -> list[Comparison]:
        """Those of the first shape of each op."""
        devices = self.devices
        return [
            found
            for found in self.comparisons
            if found["op"] in cli.OPS and found["shape"] == _first_shape(found["op"], devices[found["device"]])
        ]


def read(folder: Path) -> list[dict]:
    """All rows of a folder, oldest first. Raises DataError for one that cannot stand behind a figure; among the results
    of the project that is also one of changes that were not committed."""
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder; --results names the one that --out wrote to")
    clean = folder.resolve() == rows.RESULTS
    return sorted(rows.read(folder), key=lambda row: _claim(row, clean)["date"])


def _claim(row: dict, clean: bool) -> dict:
    """The row, if it can stand behind a figure."""
    name = f"{rows.file_name(row['device'])}: {row['op']}, {row['provider']}, {row.get('dtype')}, {row.get('shape')}"
    if "Triton interpreted" in row["device"]:
        raise DataError(f"{name}: an interpreted kernel says nothing about speed; remove the file")
    machine = "driver" if row.get("threads") is None else "threads"
    needed = [*CLAIM, machine, *(FIGURES if row["status"] == MEASURED and row.get("mode") else ())]
    lacking = [column for column in needed if row.get(column) in (None, "")]
    if lacking:
        raise DataError(f"{name}, {row.get('mode')}: no {' and no '.join(lacking)}, so no figure can rest on it")
    if clean and row["commit"].endswith("+"):
        raise DataError(f"{name}: measured with changes that were not committed ({row['commit']})")
    return row


def _case(row: dict) -> tuple[str, ...]:
    return row["device"], row["op"], json.dumps(row["shape"], sort_keys=True), row["dtype"], row["mode"]


def _fastest(found: Iterable[dict]) -> dict | None:
    return min(found, key=lambda row: row["p50_us"], default=None)


@cache
def _first_shape(op: str, cuda: bool) -> dict:
    return dict(cli.load(op).shapes(cuda)[0])


# Tables. Each is a function from results to Markdown; "" if there is no row for it.


SUMMARY = "op, shape, dtype, mode, ours, median, best other, median, times as fast, % of floor, floor by".split(", ")


def summary(comparisons: Iterable[Comparison]) -> str:
    """A table per device and state of the software: ours, the best other, and the floor."""
    by_heading = defaultdict(list)
    for found in comparisons:
        by_heading[_heading(found.rows)].append(found)
    return "\n\n".join(f"{heading}\n\n{_summary(found)}" for heading, found in by_heading.items())


def _summary(comparisons: Sequence[Comparison]) -> str:
    lines = []
    for found in comparisons:
        ours, ratio = found.ours, found.ratio(found.ours)
        floor = ("-", "-")
        if ours and ours["percent_of_floor"] is not None:
            floor = f"{ours['percent_of_floor']:.0f}", ours["floor_by"]
        what = found["op"], sizes(found["shape"]), found["dtype"], found["mode"]
        others = ", ".join(f"{row['provider']} {duration(row['p50_us'])}" for row in found.others) or "-"
        lines.append([*what, *_timed(ours), *_timed(found.rival), _number(ratio), *floor, others])
    if all(line[-1] == "-" for line in lines):
        return _markdown(SUMMARY, [line[:-1] for line in lines])
    return _markdown([*SUMMARY, "not comparable"], lines)


def _timed(row: dict | None) -> tuple[str, str]:
    return (row["provider"], duration(row["p50_us"])) if row else ("-", "-")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _heading(found: Iterable[dict], columns: Sequence[str] = ("torch", "triton", "cuda")) -> str:
    """On what the rows were taken; where they differ, all of it."""
    values = defaultdict(dict)  # as ordered sets
    for row in found:
        for column in ("device", "driver", "threads", *columns, "commit", "date"):
            if row.get(column) is not None:
                values[column][str(row[column])] = None
    said = {column: " and ".join(each) for column, each in values.items()}
    device, threads, date = said.pop("device"), said.pop("threads", None), said.pop("date")
    parts = [f"**{device}**", *([f"{threads} threads"] if threads else [])]
    return ", ".join([*parts, *(f"{column} {value}" for column, value in said.items()), date])


def ops(results: Results) -> str:
    """The first shape of each op."""
    return summary(results.headlines)


MODEL = {"B": 2, "L": 512, **CPU_SIZES, "dropout": 0.0}
FAMILIES = {"bert": "BERT", "albert": "ALBERT", "roformer": "RoFormer", "nezha": "NEZHA"}
PARTS = {
    "all logits": ("masked_lm", "fastbert"),
    "labelled logits only": ("masked_lm", "fastbert-labelled"),
    "encoder without head": ("encoder", "fastbert"),
}
FILLS = {"no padding": 1.0, "half of the batch padding": 0.5}


def models_cpu(results: Results) -> str:
    """Whole models on each CPU, against the faster of transformers' two."""
    by_device = defaultdict(list)
    for found in results.comparisons:
        if (found["op"], found["dtype"], found["mode"]) == ("model", "fp32", "fwd+bwd") and found["threads"]:
            by_device[found["device"]].append(found)
    return "\n\n".join(filter(None, map(_models, by_device.values())))


def _models(comparisons: Sequence[Comparison]) -> str:
    lines, behind = [], []
    for part_name, (part, provider) in PARTS.items():
        for fill_name, fill in FILLS.items():
            line = [f"{part_name}, {fill_name}"]
            for family in FAMILIES:
                shape = {"family": family, "part": part, "fill": fill, **MODEL}
                same = (found for found in comparisons if found["shape"] == shape and found.rival)
                row, ratio = next(((r, found.ratio(r)) for found in same for r in found.named(provider)), (None, None))
                line.append(_number(ratio))
                behind += [row] if row else []
            lines.append(line)
    heading = _heading(behind, ("torch", "transformers")) if behind else ""
    return heading and f"{heading}\n\n{_markdown(['times as fast as transformers', *FAMILIES.values()], lines)}"


def data(results: Results) -> str:
    """Masking and preparing text on one core of each CPU: millions of tokens or characters in a second."""
    shapes, by_device = {op: cli.load(op).shapes(False) for op in ("feed", "prepare")}, defaultdict(list)
    for found in results.comparisons:
        if found["threads"] and found.ours and found["shape"] in shapes.get(found["op"], ()):
            by_device[found["device"]].append(found)
    return "\n\n".join(map(_data, by_device.values()))


def _data(comparisons: Sequence[Comparison]) -> str:
    lines = []
    for found in comparisons:
        row, shape = found.ours, found["shape"]
        what, unit, figure = f"text to shards, words {shape.get('words')}", "characters", "chars_per_s"
        if found["op"] == "feed":
            kind = f"{shape['masking']}, {shape['objective']}{', filled up' * shape['filled']}"
            what, unit, figure = f"masked batches {shape['B']} x {shape['L']}: {kind}", "tokens", "tokens_per_s"
        lines.append([what, f"{row[figure] / 1e6:.1f} M {unit}/s", _number(found.ratio(row))])
    table = _markdown(["on one core", "speed", "times transformers"], lines)
    return f"{_heading([found.ours for found in comparisons], ['transformers'])}\n\n{table}"


def status(results: Results) -> str:
    """Every kernel, dtype and device: measured when, or not yet. Dtypes of which the same is to say share a line."""
    devices = results.devices | _gpus_without_rows(results)
    lines = []
    for name in (*cli.OPS, *cli.MODELS):
        benchmark = cli.load(name)
        used = {gpu: benchmark.dtypes(cuda=gpu) for gpu in (True, False)}
        dtypes = list(dict.fromkeys([*used[True], *used[False]]))
        for provider in benchmark.providers(Case(_first_shape(name, cuda=True), dtypes[0])):
            found = [row for row in results.rows if (row["op"], row["provider"]) == (benchmark.op, provider.name)]
            same = defaultdict(list)
            for dtype in dtypes if provider.ours else ():
                cells = []
                serves = {each.name for each in benchmark.providers(Case(_first_shape(name, cuda=True), dtype))}
                for device, gpu in devices.items():
                    ran = [row for row in found if (row["device"], row.get("dtype")) == (device, dtype)]
                    said = _standing(ran, benchmark.modes, _first_shape(name, gpu))
                    if said == NOT_YET and not gpu and (provider.gpu or provider.name == f"{OURS}-triton"):
                        said = "needs a GPU"
                    elif said == NOT_YET and (dtype not in used[gpu] or provider.name not in serves):
                        said = "-"
                    cells.append(said)
                same[tuple(cells)].append(dtype)
            for cells, group in same.items():
                command = f"`fastbert bench {name} --dtypes {' '.join(group)} {OUT}`" if NOT_YET in cells else "-"
                lines.append([name, provider.name, ", ".join(group), *cells, command])
    return _markdown(["op", "ours", "dtype", *devices, "command"], lines)


def _standing(found: Sequence[dict], modes: Sequence[str], first_shape: dict) -> str:
    """What the rows of a provider on a device and in a dtype, oldest first, say: of every shape the newest run. It is
    measured when every mode of the first shape is."""
    newest: dict[str, list[dict]] = {}
    for row in found:
        if row["status"] != MISSING:
            shape = json.dumps(row["shape"], sort_keys=True)
            if newest.get(shape, [{"run": None}])[0]["run"] != row["run"]:
                newest[shape] = []
            newest[shape].append(row)
    for row in (row for group in newest.values() for row in group if row["status"] in (WRONG, FAILED)):
        return f"{row['status']} {row['date']}, {row['commit']}"
    first = newest.get(json.dumps(first_shape, sort_keys=True))
    if not first:
        return NOT_YET
    missing = set(modes) - {row["mode"] for row in first}
    what = f"measured but for {', '.join(sorted(missing))}" if missing else "measured"
    return f"{what} {first[0]['date']}, {first[0]['commit']}"


def tests(results: Results) -> str:
    """What the tests said on each GPU: of each file and tool the newest row."""
    lines = []
    for device, gpu in (results.devices | _gpus_without_rows(results)).items():
        found = [row for row in results.rows if row["device"] == device and row["op"] == "tests"]
        newest = {(row["provider"], row["shape"]["file"]): row for row in found}
        for (tool, file), row in newest.items():
            said = "ended well" if row["status"] == MEASURED else f"{row['status']}: {row['reason']}"
            chosen = f"{file} {row['words']}".strip()
            counts = [str(row.get(column, "-")) for column in ("passed", "failed", "skipped")]
            lines.append([device, tool, chosen, said, *counts, f"{row['commit']}, {row['date']}"])
        if gpu and not newest:
            lines.append([device, "-", "-", "not yet run", *"----"])
    return _markdown(["device", "tool", "tests", "", "passed", "failed", "skipped", "commit, date"], lines)


def _gpus_without_rows(results: Results) -> dict[str, bool]:
    return {gpu: True for gpu in GPUS if not any(device.startswith(gpu) for device in results.devices)}


def images(kinds: Sequence[str], results: Results) -> str:
    """Links to the plots. Raises MissingFileError for one that was not drawn from these rows."""
    links = []
    for plot in planned(results, kinds):
        path = results.plots / plot.name
        if not plot.is_drawn(path):
            raise MissingFileError(f"{path} was not drawn from these rows: run fastbert bench report --plots")
        link = os.path.relpath(path.resolve(), results.beside.resolve()).replace(os.sep, "/")
        links.append(f"![{plot.title.partition(chr(10))[0]}]({link})")
    return "\n\n".join(links)


def planned(results: Results, kinds: Sequence[str] = ("floors", "lengths")) -> list[plots.Plot]:
    """The plots that the rows allow."""
    found = {"floors": plots.floors(results.headlines), "lengths": plots.lengths(results.all_comparisons)}
    return [plot for kind in kinds for plot in found[kind]]


@dataclass(frozen=True)
class Table:
    """What stands between markers: how it is made, and the command that measures what it needs."""

    render: Callable[[Results], str]
    command: str

    @property
    def unmeasured(self) -> str:
        return f"Not yet measured: `{self.command}`"


_EVERYTHING = f"fastbert bench {OUT}"
TABLES = {
    "ops": Table(ops, _EVERYTHING),
    "data": Table(data, f"fastbert bench feed --device cpu {OUT}"),
    "models-cpu": Table(models_cpu, f"fastbert bench models --device cpu {OUT}"),
    "status": Table(status, _EVERYTHING),
    "tests": Table(tests, "make gpu SLICE=correctness"),
    "plots": Table(partial(images, ("floors", "lengths")), _EVERYTHING),
    "plots-floor": Table(partial(images, ("floors",)), _EVERYTHING),
}


def table(name: str, where: str) -> Table:
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: got {name!r}, expected one of {', '.join(TABLES)}{hint}")
    return TABLES[name]


def updated(path: Path, results: Results) -> str:
    """The text of the file with every table anew. Raises ConfigError or DataError for markers that make no sense."""
    found, opened = [], None
    results = replace(results, beside=path.parent)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        marker = MARKER.fullmatch(line.strip())
        if opened and marker or not opened and line.strip() == END:
            raise DataError(
                f"{path}, line {number}: {line.strip()} {'inside' if opened else 'without'} <!-- report -->"
            )
        if marker:
            chosen = table(marker[1], f"{path}, line {number}")
            opened = number
            text = chosen.render(results) or chosen.unmeasured
            found += [line, "", text, ""]
        elif line.strip() == END:
            opened = None
        if not opened:
            found.append(line)
    if opened:
        raise DataError(f"{path}, line {opened}: no line {END} follows the marker")
    return "\n".join(found) + "\n"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that can be read as it is. Columns of figures are on the right."""
    columns = list(zip(head, *lines, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(FIGURE.fullmatch(cell) for cell in column[1:]) for column in columns]
    rule = ["-" * (width - 1) + (":" if side else "-") for width, side in zip(widths, right, strict=True)]
    padded = [
        [
            cell.rjust(width) if side else cell.ljust(width)
            for cell, width, side in zip(line, widths, right, strict=True)
        ]
        for line in (head, rule, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# The command.


def main(argv: Sequence[str], prog: str = "fastbert bench report") -> int:
    """Runs the command. Returns 0; 1 if --check finds a difference; 2 if the table asked for has no rows."""
    options = _parser(prog).parse_args(argv)
    rewrites = options.check or options.update is not None
    if (options.device or options.ops) and (options.table or rewrites):
        raise ConfigError("--device and --ops are for the summary and --plots, not for --table, --update or --check")
    results = Results(read(options.results), Path(options.plots or options.results / "plots"))
    results = _chosen(results, options.device, options.ops)
    if options.plots is not None:
        _draw(results)
    if rewrites:
        return _rewrite(options.update or FILES, results, options.check)
    if options.table:
        chosen = table(options.table, "--table")
        text = chosen.render(results)
        print(text or chosen.unmeasured)
        return 0 if text else 2
    if options.plots is None:
        print(summary(results.comparisons) or TABLES["ops"].unmeasured)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="", metavar="NAME", help="devices whose name contains NAME; default: all")
    parser.add_argument("--ops", nargs="+", default=(), metavar="OP", help="default: all")
    parser.add_argument("--table", metavar="NAME", help=f"print one table: {', '.join(TABLES)}")
    parser.add_argument("--plots", nargs="?", const="", metavar="FOLDER", help="draw; default: plots beside the rows")
    parser.add_argument("--update", nargs="*", type=Path, metavar="FILE", help="rewrite FILEs; default: both READMEs")
    parser.add_argument("--check", action="store_true", help="write nothing, print what --update would change")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, metavar="FOLDER", help="where the rows are")
    return parser


def _chosen(results: Results, device: str, names: Sequence[str]) -> Results:
    """The rows of devices whose name contains `device`, of the ops named. Raises DataError if none is measured."""
    found = [r for r in results.rows if device.lower() in r["device"].lower() and (not names or r["op"] in names)]
    chosen = replace(results, rows=found)
    if (device or names) and not chosen.comparisons:
        measured = {(found["op"], found["device"]) for found in results.comparisons}
        known = "; ".join(f"{op} on {where}" for op, where in sorted(measured)) or "nothing"
        raise DataError(f"nothing measured for {' '.join([device, *names]).strip()}; measured: {known}")
    return chosen


def _draw(results: Results) -> None:
    found = planned(results)
    for path in plots.write(found, results.plots):
        print(path)
    if not found:
        print("Nothing to draw: no op was measured at its first shape, none at several lengths.")


def _rewrite(paths: Sequence[Path], results: Results, check: bool) -> int:
    different = 0
    for path in paths:
        if not path.is_file():
            raise MissingFileError(f"{path}: no such file")
        old, new = path.read_text(encoding="utf-8"), updated(path, results)
        if check:
            lines = old.splitlines(True), new.splitlines(True)
            print("".join(difflib.unified_diff(*lines, str(path), f"{path} (from the rows)")), end="")
        elif new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: updated")
        different += new != old
    return 1 if check and different else 0
