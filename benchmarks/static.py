"""What the compilers say of every kernel that ships, for every GPU generation, on a machine without a GPU.

    python -m benchmarks.static                                    the whole table
    python -m benchmarks.static --targets sm_90 --kernels gelu     while tuning: what a change did
    python -m benchmarks.static --kernels gelu --sass              with the instructions of the loops
    python -m benchmarks.static --write                            renew benchmarks/results/static.txt
    python -m benchmarks.static --check                            exit 1 with a diff where that file is out of date

Triton kernels are compiled as their own launchers launch them: the launchers run on small CPU tensors, with a driver
that names the target and launches nothing. CUDA sources are compiled by nvcc with the flags of setup.py, where both are
there. Registers, spilled bytes, shared memory and instructions are facts; the clocks are an occupancy of pipes computed
from the rates that the table states, to say which pipe binds. They are not a time.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import importlib.util
import itertools
import math
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from tqdm import tqdm

from fastbert.errors import BackendError

from . import sass
from .launches import CONFIGURATIONS, Launches

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).resolve().parent / "results" / "static.txt"
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
WIDTH = 140
SMALL_LOOP = 40  # instructions below which a kernel's second loop is not shown


@dataclasses.dataclass
class Compiled:
    """One kernel in one configuration for one target."""

    source: str  # gelu, lamb
    kernel: str
    names: list[str]  # of the launches that run exactly this code
    settings: str
    target: int
    used: sass.Resources
    shared: int  # bytes of a CTA, static and dynamic
    tensor_columns: int
    dot: bool  # whether its source multiplies matrices
    code: list[sass.Instruction]
    identity: str  # of the source, its configuration and the compiler

    @property
    def loops(self) -> list[tuple[str, list[sass.Instruction]]]:
        """(where, instructions): the longest inner loop and every other that is not tiny, or the body."""
        loops = sass.loops(self.code)
        shown = loops[:1] + [loop for loop in loops[1:] if len(loop) >= SMALL_LOOP]
        return [(f"loop {i}", loop) for i, loop in enumerate(shown, 1)] or [("body", sass.body(self.code))]

    @property
    def residency(self) -> tuple[int, str]:
        """(CTAs that fit an SM, what limits them)."""
        used = self.used
        return sass.residency(self.target, used.registers, self.shared, used.warps, self.tensor_columns)

    @property
    def spills(self) -> bool:
        return self.used.stack > 0 or "local" in (i.pipe for i in self.code)


class _Driver:
    """Answers Triton for a GPU that is not there. The device is the target, so that each has its own cache."""

    def __init__(self, target: int):
        self.target = target

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, sass.WARP)


@contextlib.contextmanager
def _recorded(target: int) -> Iterator[list]:
    """The (function, compiled, settings) of every launch inside, compiled for this target instead of launched."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch, seen = JITFunction.run, []

    def record(self, *args, grid, warmup, **options):
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        constants = compiled.src.constants.items()
        values = {self.arg_names[path[0]]: value for path, value in constants if len(path) == 1}  # no part of a tuple
        values |= {"num_warps": compiled.metadata.num_warps}
        values |= {name: value for name, value in options.items() if name not in self.arg_names}
        seen.append((self, compiled, " ".join(f"{name}={value}" for name, value in values.items())))
        return compiled

    capability = divmod(target, 10)
    driver.set_active(_Driver(target))  # for good: without a GPU there is none to go back to
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
    ):
        yield seen


# In the workers: processes of their own, in which Triton was never told to interpret.


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _names(launches: Callable[[], Launches]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in launches()))


def _compile_triton(source: str, launches: Callable[[], Launches], name: str, target: int) -> list[Compiled]:
    """Every kernel that the launches of this name run."""
    with _recorded(target) as seen:
        for each, launch in launches():
            if each == name:
                launch()
    found = []
    kernels = _read([compiled.asm["cubin"] for _, compiled, _ in seen], target)
    for (function, compiled, settings), read in zip(seen, kernels, strict=True):
        ((used, code),) = read.values()
        shared, columns = used.shared + compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
        kernel, dot = function.__name__, "tt.dot" in compiled.asm["ttir"]
        found.append(
            Compiled(source, kernel, [name], settings, target, used, shared, columns, dot, code, compiled.hash)
        )
    return found


def _compile_cuda(source: Path, nvcc: str, flags: list[str], target: int) -> list[Compiled]:
    """Every kernel of a CUDA source."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [nvcc, *flags, "-std=c++17", "-cubin", f"-arch=sm_{target}", source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BackendError(f"{source.name}: nvcc cannot compile it for sm_{target}:\n{done.stderr}")
        [kernels] = _read([cubin.read_bytes()], target)
    settings = f"at most {{}} threads, {' '.join(flags)}"
    return [
        Compiled(
            source.stem, _demangle(name), ["as built"], settings.format(used.warps * sass.WARP), target, used,
            used.shared, 0, False, code, name,
        )
        for name, (used, code) in sorted(kernels.items(), key=lambda item: _demangle(item[0]))
    ]  # fmt: skip


def _read(cubins: Sequence[bytes], target: int) -> list[dict[str, tuple[sass.Resources, list[sass.Instruction]]]]:
    """{kernel: what a CTA of it takes, its instructions} of each cubin."""
    from triton import knobs

    taken = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for cubin in cubins:
            path.write_bytes(cubin)
            taken.append(sass.resources(knobs.nvidia.cuobjdump.path, str(path)))
    code = sass.disassemble(knobs.nvidia.nvdisasm.path, cubins, target)
    return [{name: (used[name], found[name]) for name in used} for used, found in zip(taken, code, strict=True)]


def _demangle(name: str) -> str:
    """A C++ kernel's name with its template arguments, without namespaces and parameters."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    full = demangle(name.encode(), None, None, None)
    return re.search(r"(\w+(?:<.*>)?)\(", full.decode().replace("(anonymous namespace)::", ""))[1] if full else name


# In the process that asks.


@dataclasses.dataclass
class Toolchain:
    """The compilers there are, and what they are called in the table."""

    triton: str
    nvcc: str | None
    cuda: str
    flags: list[str]
    cuda_targets: list[int]

    @classmethod
    def find(cls) -> "Toolchain":
        import triton
        from triton import knobs

        ptxas, blackwell = knobs.nvidia.ptxas.version, knobs.nvidia.ptxas_blackwell.version
        version = f"triton {triton.__version__}, ptxas {ptxas}, for sm_100 and above {blackwell}"
        if not (ROOT / "setup.py").exists():
            return cls(version, None, "left out, no setup.py beside the benchmarks names its flags", [], [])
        nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
        if nvcc is None:
            return cls(version, None, "left out, nvcc not found", [], [])
        release = re.search(r"V([0-9.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
        missing = "".join(f", without sm_{target}" for target in sass.TARGETS if f"sm_{target}" not in known)
        flags = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["NVCC_FLAGS"]
        return cls(version, nvcc, f"nvcc {release}{missing}", flags, [t for t in sass.TARGETS if f"sm_{t}" in known])


def collect(
    configurations: dict[str, Callable[[], Launches]], sources: list[Path], tools: Toolchain, targets: list[int]
) -> list[Compiled]:
    """Compile all of it, on every core; the same list whatever finishes first."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, _start_worker) as pool:
        names = {source: pool.submit(_names, launches) for source, launches in configurations.items()}
        jobs = [
            pool.submit(_compile_triton, source, launches, name, target)
            for source, launches in configurations.items()
            for name in names[source].result()
            for target in targets
        ]
        jobs += [
            pool.submit(_compile_cuda, source, tools.nvcc, tools.flags, target)
            for source in sources
            for target in targets
            if target in tools.cuda_targets
        ]
        try:
            for job in tqdm(concurrent.futures.as_completed(jobs), "compiling", len(jobs), unit="job", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = {}
    for each in itertools.chain.from_iterable(job.result() for job in jobs):
        known = found.setdefault((each.source, each.kernel, each.target, each.identity), each)
        known.names += [name for name in each.names if name not in known.names]
    return list(found.values())


PREAMBLE = """\
What the compilers say of every kernel that ships, by `python -m benchmarks.static --write`. No GPU was asked.

A row is one target. regs: registers per thread. spill: bytes of stack per thread. shared: bytes per CTA. CTAs: how
many fit an SM, and what limits them. Then the innermost loops that touch memory or the matrix unit, longest first, or
the whole body where there is none. n: instructions of one warp in one pass, predicated ones and rare branches included.
clk: clocks that one pass of one CTA (one tile) occupies the pipes of an SM; `?`: not known from the mnemonic.
binds: the pipe that needs most. This is occupancy at the rates below and not a time: latency, dependencies and bank
conflicts come on top. B/clk: bytes that the loop moves from and to global memory per clock of the binding pipe. Where
that exceeds the DRAM rate below, DRAM binds a kernel that streams its data, and no pipe does.

mma: HGMMA, HMMA, tcgen05 (UTC*MMA). mufu: MUFU and the conversions of its unit. cvt: packing conversions (F2FP). smem:
LDS STS LDSM. gmem: LDG STG LDGSTS RED. local: LDL STL, the spills. sync: BAR and other waiting. other: issue only.

Assumed, per clock and SM, in lanes unless it says otherwise:
"""


def _rates() -> Iterator[str]:
    def row(name, values):
        return f"  {name:<44}" + "".join(f"{value:>14}" for value in values)

    yield row("", (f"sm_{target}" for target in sass.TARGETS))
    yield row("issue, warp instructions", [sass.ISSUE] * len(sass.TARGETS))
    for pipe, kinds in sass.OPCODES.items():
        for kind in kinds:
            if kind in sass.LANES:
                yield row(f"{pipe}: {' '.join(kinds[kind].split()[:3])}", sass.LANES[kind])
    yield row("smem, gmem, local: bytes", [sass.BYTES] * len(sass.TARGETS))
    yield row("mma: dense 16 bit (TF32 half, 8 bit twice)", [sm.mma for sm in sass.SM.values()])
    yield row("mma: the same through HMMA", [sm.mma_sync or "?" for sm in sass.SM.values()])
    yield row("DRAM bytes", [sm.dram for sm in sass.SM.values()])
    yield row("  of", [sm.device for sm in sass.SM.values()])
    yield row("shared memory of a CTA, at most, in bytes", [sm.shared_cta for sm in sass.SM.values()])
    yield ""
    yield "Lanes: after the CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions. FLOP and DRAM"
    yield "bytes: the data sheet of the device, at the clock of its peak FLOP rate. None of them was measured."


HEAD = f"  {'target':<7}{'regs':>4}{'spill':>6}{'shared':>7}{'CTAs':>5} {'by':<7}{'where':<7}{'':<3}"
HEAD += "".join(f"{pipe:>6}" for pipe in sass.PIPES) + f" {'binds':<6}{'B/clk':>6}"


def _cell(value: float, digits: int = 0) -> str:
    return "?" if math.isnan(value) else f"{value:.{digits}f}" if value else "."


def _row(each: Compiled) -> Iterator[str]:
    ctas, by = each.residency
    left = f"  sm_{each.target:<4}{each.used.registers:>4}{each.used.stack:>6}{each.shared:>7}{ctas:>5} {by:<7}"
    for where, code in each.loops:
        counts, clocks = sass.count(code), sass.clocks(code, each.target, each.used.warps)
        binds = sass.binding(clocks)
        moved = clocks["gmem"] * sass.BYTES / clocks[binds.rstrip("?")]
        yield f"{left}{where:<7}n  " + "".join(f"{counts[pipe] or '.':>6}" for pipe in sass.PIPES)
        cells = "".join(f"{_cell(value):>6}" for value in clocks.values())
        yield f"{'':<{len(left) + 7}}clk{cells} {binds:<6}{_cell(moved, 1):>6}"
        left = " " * len(left)


def _group(rows: list[Compiled]) -> Iterator[str]:
    """The rows of one kernel."""
    yield f"{rows[0].source}: {rows[0].kernel}"
    by_configuration = {}
    for each in rows:
        by_configuration.setdefault((", ".join(each.names), each.settings), []).append(each)
    for (names, settings), members in by_configuration.items():
        yield ""
        yield from textwrap.wrap(f"{names}: {settings}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        yield HEAD.rstrip()
        for each in sorted(members, key=lambda each: each.target):
            yield from (line.rstrip() for line in _row(each))


def table(rows: list[Compiled], tools: Toolchain) -> str:
    """The text of benchmarks/results/static.txt."""
    lines = [*PREAMBLE.splitlines(), *_rates()]
    for title, cuda in ((f"Triton kernels: {tools.triton}", False), (f"CUDA sources: {tools.cuda}", True)):
        lines += ["", f"== {title}"]
        kernels = {}
        for each in rows:
            if (each.source not in CONFIGURATIONS) == cuda:
                kernels.setdefault((each.source, each.kernel), []).append(each)
        for members in kernels.values():
            lines += ["", *_group(members)]
    return "\n".join(lines) + "\n"


def _parts(text: str) -> dict[str, list[str]]:
    """{heading, with the compiler's version: lines} of a table."""
    preamble, *parts = re.split(r"^(?=== )", text, flags=re.MULTILINE)
    return {"preamble": preamble.splitlines()} | {part.splitlines()[0]: part.splitlines() for part in parts}


def compare(committed: str, current: str) -> tuple[list[str], list[str]]:
    """(diff, headings not compared): a part is compared where the same compiler wrote it in both."""
    old, new = _parts(committed), _parts(current)
    pairs = [(old[heading], new[heading]) for heading in new if heading in old]
    diff = [line for a, b in pairs for line in difflib.unified_diff(a, b, "committed", "now", n=0, lineterm="")]
    return diff, [heading for heading in new if heading not in old]


def listing(rows: list[Compiled]) -> Iterator[str]:
    """The instructions of the loops in the table."""
    for each in rows:
        for where, code in each.loops:
            yield f"{each.source}: {each.kernel}, {', '.join(each.names)}, sm_{each.target}, {where}"
            yield from (f"    {i.address:5x} {i.predicate:>5} {i.text}" for i in code)


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.static") -> int:
    """Compile, then print, write or check the table. 1: the committed table is out of date; 2: nothing was done."""
    arguments = _arguments(argv, prog)
    if importlib.util.find_spec("triton") is None:
        print(f"{prog}: Triton is not installed, and it brings the compiler: pip install triton", file=sys.stderr)
        return 2
    try:
        tools = Toolchain.find()
        if arguments.write and tools.nvcc is None:
            raise BackendError(f"--write: CUDA sources are {tools.cuda}, and the table would lose them")
        rows = collect(
            {name: launches for name, launches in CONFIGURATIONS.items() if name in arguments.kernels},
            [source for source in SOURCES if source.stem in arguments.kernels],
            tools,
            [target for target in sass.TARGETS if f"sm_{target}" in arguments.targets],
        )
        text = table(rows, tools)
        if arguments.check:
            return _check(text)
        if arguments.write:
            TABLE.write_text(text, encoding="utf-8")
        else:
            print(text + "".join(f"{line}\n" for line in listing(rows) if arguments.sass), end="")
        return 0
    except (BackendError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2


def _arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = [f"sm_{target}" for target in sass.TARGETS]
    kernels = [*CONFIGURATIONS, *(source.stem for source in SOURCES)]
    listed = f"of {', '.join(targets)}; default: all"
    parser.add_argument("--targets", nargs="+", choices=targets, default=targets, metavar="TARGET", help=listed)
    listed = f"of {', '.join(kernels)}; default: all"
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels, metavar="NAME", help=listed)
    parser.add_argument("--sass", action="store_true", help="print the instructions of the loops too")
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--write", action="store_true", help="write the table to benchmarks/results/static.txt")
    act.add_argument("--check", action="store_true", help="compare with that file, where the compilers are the same")
    arguments = parser.parse_args(argv)
    if (arguments.write or arguments.check) and (arguments.targets, arguments.kernels) != (targets, kernels):
        parser.error("--write and --check take the whole table: leave out --targets and --kernels")
    return arguments


def _check(text: str) -> int:
    diff, elsewhere = compare(TABLE.read_text(encoding="utf-8"), text)
    for heading in elsewhere:
        print(f"not compared, the committed table has none by this compiler: {heading[3:]}", file=sys.stderr)
    print("".join(f"{line}\n" for line in diff), end="")
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
