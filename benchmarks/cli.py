"""`fastbert bench`: what is measured, on which device, and where the rows go.

    fastbert bench                                     every op; without a GPU small shapes on the CPU
    fastbert bench rotary_attention --dtypes bf16      one op
    fastbert bench attention --shape B=8 L=1024 D=128  your own shape; sizes that are not named stay as they are
    fastbert bench bias_gelu --sweep --modes fwd       a kernel's possible launch configurations, against each other
    fastbert bench --list                              ops, their shapes and who is compared
    fastbert bench report                              tables and plots from the rows; see fastbert bench report --help
    fastbert bench static                              what the compiler says, without a GPU; see ... static --help

Every provider is first held to float64 by fastbert.testing.compare, but for those that compute something else by
design and are nobody's rival; then the providers take turns. A provider that is not installed, or cannot express what
is asked, is a line that says so. Without --out nothing is written.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from fastbert.errors import ConfigError, FastBertError

from . import rows
from .breakdown import Part, lines
from .ceilings import DTYPES
from .harness import OURS, Benchmark, Case, Runner, Settings, Spoilt
from .profiles import profiles
from .sweep import Sweep

OPS = (
    "attention",
    "rotary_attention",
    "relative_attention",
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "linear_cross_entropy",
    "encoder_layers",
    "shared_linear",
    "lamb",
)
MODELS = ("models", "accelerate", "latency", "train", "feed", "prepare")
COMMANDS = ("report", "static")
SPOILT = 3
# What sizes that are no whole numbers may be: (least, largest).
RANGES = {"dropout": (0.0, 0.99), "filled": (0, 1), "fill": (0.5, 1.0), "labelled": (0.01, 1.0)}


def main(argv: Sequence[str], prog: str = "fastbert bench") -> int:
    """Runs the command and returns its exit code: 0; 1 if one of our own providers was wrong or failed; 2 for an error
    that the user can mend; SPOILT if the rest needs another process."""
    if argv and argv[0] in COMMANDS:
        prog = f"{prog} {argv[0]}"
    try:
        if argv and argv[0] in COMMANDS:
            return import_module(f".{argv[0]}", __package__).main(argv[1:], prog=prog)
        return _bench(_parser(prog).parse_args(argv))
    except Spoilt as error:
        print(f"{prog}: the GPU needs a new process ({error}); go on with --skip-measured --events", file=sys.stderr)
        return SPOILT
    except (FastBertError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2


def load(name: str) -> Benchmark:
    """The benchmark of an op or of models, by its name."""
    if name not in (*OPS, *MODELS):
        raise ConfigError(f"benchmark: got {name!r}, expected one of {', '.join((*OPS, *MODELS, *COMMANDS))}")
    return import_module(f".{name}", __package__).BENCHMARK


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join((*OPS, *MODELS))}; default: every op")
    parser.add_argument("--list", action="store_true", help="show shapes and providers, measure nothing")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp16 bf16, one shape in fp32; CPU: fp32")
    parser.add_argument(
        "--modes", nargs="+", choices=("fwd", "bwd", "fwd+bwd", "step", "call", "batch"), help="default: all"
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="names or their beginnings; default: all")
    parser.add_argument("--shape", nargs="+", type=_size, metavar="SIZE=N", help="in place of the first shape's sizes")
    parser.add_argument("--tiny", action="store_true", help="one small shape: a rehearsal, for Triton's interpreter")
    parser.add_argument("--cases", type=_range, metavar="A:B", help="only cases A to B - 1; the first tell the most")
    parser.add_argument("--skip-measured", action="store_true", help="leave out what --out holds of this commit")
    parser.add_argument("--sweep", action="store_true", help="time what a kernel's launch_config could answer")
    parser.add_argument("--profile", action="store_true", help="show where the time goes; measure and write nothing")
    parser.add_argument("--events", action="store_true", help="launch steps from Python, replay no CUDA graphs")
    parser.add_argument("--rounds", type=_positive, help="turns of each provider; default: 50, on a CPU 10")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after this time")
    parser.add_argument("--threads", type=_positive, help="CPU threads; default: as PyTorch decides")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="append rows to FOLDER/<device>.jsonl")
    return parser


def _size(text: str) -> tuple[str, int | float | str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not SIZE=N, such as L=512")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _range(text: str) -> slice:
    first, colon, last = text.partition(":")
    try:
        return slice(int(first or 0), int(last) if last else None) if colon else slice(int(first), int(first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B, such as :4 or 4:") from None


def cases(benchmark: Benchmark, options: argparse.Namespace, device: str, cuda: bool) -> list[Case]:
    """What is measured, in order: every shape in 16 bits, then the first one in float32."""
    shapes = benchmark.shapes(cuda)
    own = (benchmark.tiny if options.tiny else {}) | dict(options.shape or ())
    unknown = sorted(set(own) - set(shapes[0]))
    if unknown:
        raise ConfigError(f"--shape: {benchmark.op} has no {', '.join(unknown)}, but {', '.join(shapes[0])}")
    for name, size in own.items():
        _check_size(name, size, shapes[0][name])
    if own:
        shapes = [{**shapes[0], **own}]
    dtypes = options.dtypes or benchmark.dtypes(cuda)
    narrow = [Case(shape, dtype, device) for shape in shapes for dtype in dtypes if dtype != "fp32"]
    wide = [Case(shape, "fp32", device) for shape in (shapes[:1] if narrow else shapes) if "fp32" in dtypes]
    return (narrow + wide)[options.cases or slice(None)]


def _check_size(name: str, size: int | float | str, like: int | float | str) -> None:
    if isinstance(like, str):
        return  # the benchmark knows what it may be
    least, largest = RANGES.get(name, (1, float("inf")))
    whole = isinstance(like, int)
    if isinstance(size, str) or (whole and not isinstance(size, int)) or not least <= size <= largest:
        kind = f"a whole number of at least {least}" if whole else f"a number from {least:g} to {largest:g}"
        raise ConfigError(f"--shape: got {name}={size}, expected {kind}")


def _check_names(chosen: dict[str, Benchmark], todo: dict[str, list[Case]], options: argparse.Namespace) -> None:
    """Something is left to measure of what was asked for."""
    found = [case for cases in todo.values() for case in cases]
    if not found:
        raise ConfigError("--cases: no case is left; --list shows them")
    modes = sorted({mode for benchmark in chosen.values() for mode in benchmark.modes})
    if options.modes and not set(options.modes) & set(modes):
        raise ConfigError(f"--modes: got {' '.join(options.modes)}, but {', '.join(chosen)}: {', '.join(modes)}")
    names = {p.name: None for name, b in chosen.items() for case in todo[name] for p in b.providers(case)}
    for asked in options.providers or ():
        if not any(name.startswith(asked) for name in names):
            raise ConfigError(f"--providers: got {asked!r}, expected one of {', '.join(names)}")


def _bench(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = _usable(device)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {name: load(name) for name in options.names or OPS}
    if options.sweep:
        chosen = {name: Sweep(benchmark) for name, benchmark in chosen.items()}
    todo = {name: cases(benchmark, options, device, cuda) for name, benchmark in chosen.items()}
    _check_names(chosen, todo, options)
    if options.list:
        for name, benchmark in chosen.items():
            _describe(benchmark, todo[name])
        return 0
    settings = Settings(
        device=device,
        modes=options.modes,
        providers=options.providers,
        rounds=options.rounds or (50 if cuda else 10),
        deadline=time.monotonic() + 60 * options.minutes,
        graphs=not options.events,
    )
    if options.profile:
        for name, benchmark in chosen.items():
            for table in profiles(benchmark, todo[name], settings):
                print(table, flush=True)
        return 0
    environment = rows.environment(device)
    if options.skip_measured:
        todo = {
            name: _unmeasured(benchmark.op, settings.modes_of(benchmark), todo[name], options.out, environment)
            for name, benchmark in chosen.items()
        }
    if cuda and options.out and not environment["commit"]:
        raise ConfigError("--out: rows without a commit are no evidence; without git history set FASTBERT_COMMIT")
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value is not None), flush=True)
    wrong, table = 0, Table()
    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None) as bar:
        dtypes = {case.dtype for cases in todo.values() for case in cases}
        runner = Runner(settings, dtypes, _print_progress if bar.disable else bar.set_description_str)
        measured = (runner.rows(benchmark, todo[name]) for name, benchmark in chosen.items())
        for row in chain(runner.ceiling_rows(), *measured):
            if options.out:
                rows.write(options.out, [row])
            bar.write(table.lines(row))
            wrong += row["status"] in (rows.WRONG, rows.FAILED) and row["provider"].startswith(OURS)
    if options.sweep:
        print(table.fastest())
    if wrong:
        print(f"{wrong} of fastbert's own rows are wrong or failed: see above", file=sys.stderr)
    return 1 if wrong else 0


def _unmeasured(op: str, modes: Sequence[str], cases: list[Case], out: Path | None, environment: dict) -> list[Case]:
    """The cases of whose last mode there is no row of this commit on this device."""
    if out is None:
        raise ConfigError("--skip-measured: expected --out, the folder that holds what was measured")
    path = out / rows.file_name(environment["device"])
    same = {"op": op, "status": rows.MEASURED, "mode": modes[-1] if modes else None, "commit": environment["commit"]}
    found = [row for row in rows.read_file(path) if same.items() <= row.items()] if path.exists() else []
    return [case for case in cases if not any((r["shape"], r["dtype"]) == (case.shape, case.dtype) for r in found)]


def _print_progress(text: str) -> None:
    """Where there is no terminal: a log in which a hang can be seen."""
    print(f"... {text}", file=sys.stderr, flush=True)


def _usable(device: str) -> bool:
    """Whether the device is a GPU. Raises ConfigError if it is none that can be used."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device: got {device!r}, expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: got {device!r}, but PyTorch {torch.__version__} finds no GPU")
    if kind == "cuda":
        torch.cuda.set_device(device if ":" in device else "cuda:0")
    return kind == "cuda"


def _describe(benchmark: Benchmark, cases: Sequence[Case]) -> None:
    print(f"{benchmark.op} ({', '.join(benchmark.modes)})")
    for case in cases:
        print(f"  {case}: {', '.join(provider.name for provider in benchmark.providers(case))}")


class Table:
    """Rows as lines for a person, under a headline for each case."""

    def __init__(self):
        self._case = None
        self._fastest: dict[tuple, dict] = {}

    def lines(self, row: dict) -> str:
        if row["op"] == "ceilings":
            found = ", ".join(f"{name} {value}" for name, value in row["ceilings"].items())
            return f"ceilings {row['dtype']}: {found}"
        shape = " ".join(f"{name}={size}" for name, size in row.get("shape", {}).items())
        case = f"{row['op']} {shape} {row.get('dtype', '')}".strip()
        head = ""
        if case != self._case:
            self._case = case
            head = f"\n{case}\n  {'mode':8}{'provider':24}{'p20 us':>11}{'p50 us':>11}{'p80 us':>11}"
            head += f"{'TFLOP/s':>9}{'GB/s':>8}{'% floor':>9}{'MiB':>9}{'ratio':>7}\n"
        line = f"  {row.get('mode') or '':8}{row['provider']:24}"
        if row["status"] != rows.MEASURED:
            return f"{head}{line} {row['status']}: {row['reason']}"
        best = self._fastest.setdefault((case, row["mode"]), row)
        if row["p50_us"] < best["p50_us"]:
            self._fastest[case, row["mode"]] = row
        line += "".join(f"{row[name]:11.1f}" for name in ("p20_us", "p50_us", "p80_us"))
        for name, width in (("tflops", 9), ("gb_per_s", 8), ("percent_of_floor", 9), ("peak_mib", 9)):
            line += f"{'-' if row[name] is None else format(row[name], '.1f'):>{width}}"
        line += "-".rjust(7) if row["ratio"] is None else format(row["ratio"], "7.2f")
        if "tokens_per_s" in row:
            line += f"  {row['tokens_per_s']:,.0f} tokens/s"
        if "chars_per_s" in row:
            line += f"  {row['chars_per_s']:,.0f} characters/s"
        if "mfu" in row:
            line += f", MFU {row['mfu']:.1f} %"
        if "breakdown" in row:
            line += "\n" + lines(Part(**part) for part in row["breakdown"])
        return head + line

    def fastest(self) -> str:
        """The fastest provider of every case and mode so far."""
        rows = self._fastest.items()
        found = (f"  {case} {mode}: {row['provider']}, {row['p50_us']:.1f} us" for (case, mode), row in rows)
        return "\nfastest:\n" + "\n".join(found)
