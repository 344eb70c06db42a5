"""Read what a compiler wrote: a kernel's loops, its instructions by pipe, the clocks of each pipe, what fits an SM.

The clocks are the occupancy of one SM's pipes by one CTA, computed from instruction counts and the rates below. They
are a lower bound and not a time: latency, dependencies, bank conflicts, caches and DRAM are not in them.

Lanes per clock and SM are those of the CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" (16
and 64 bit conversions: its conversion rows; integer minimum, logic and shift as integer addition). Bytes per clock are
the width of L1 and shared memory. Matrix rates are the dense 16-bit peak of the data sheet divided by SMs and clock.
Where a rate is not published (tcgen05 and TMA name no shape in the mnemonic) the clocks are unknown, printed as `?`.
"""

import collections
import dataclasses
import itertools
import math
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence

WARP = 32
ISSUE = 4  # warp instructions per clock and SM: one for each of its four schedulers
BYTES_PER_INSTRUCTION = 16  # of machine code, on every target
BYTES = 128  # bytes per clock and SM, of L1 and of shared memory
TARGETS = (80, 89, 90, 100, 120)
PIPES = ("issue", "fma", "alu", "fp64", "mufu", "cvt", "shfl", "smem", "gmem", "local", "mma", "sync", "other")
# Pipe -> class of instructions -> opcodes. What is not here is `other`, and costs no more than its issue.
OPCODES = {
    "fma": {
        "fp32": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I FSWZADD",
        "fp32x2": "FFMA2 FMUL2 FADD2",
        "fp16x2": "HFMA2 HMUL2 HADD2",
        "imad": "IMAD IMUL IDP",
    },
    "alu": {
        "int": "IADD3 LOP3 SEL FSETP IADD VIADD IADD32I VIADDMNMX SHF SHL SHR LEA PRMT SGXT BMSK MOV CS2R IABS IMNMX "
        "VIMNMX VIMNMX3 ISETP PLOP3 P2R R2P VOTE VOTEU FSEL FSET FMNMX FMNMX3 FCHK HMNMX2 HSETP2 HSET2 VHMNMX",
    },
    "fp64": {"fp64": "DFMA DMUL DADD DSETP DMNMX", "cvt64": "F2F.F64 F2I.F64 I2F.F64 FRND.F64"},
    "mufu": {"mufu": "MUFU F2F F2I I2F FRND POPC FLO BREV"},
    "cvt": {"pack": "F2FP I2FP F2IP I2IP"},
    "shfl": {"shuffle": "SHFL", "redux": "REDUX CREDUX"},
    "smem": {"bytes": "LDS STS LDSM STSM ATOMS"},
    "gmem": {
        "bytes": "LDG STG LD ST LDGSTS ATOM ATOMG RED REDG",
        "unknown": "UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED",
    },
    "local": {"bytes": "LDL STL"},
    "mma": {
        "mma": "HMMA IMMA QMMA HGMMA IGMMA QGMMA",
        "unknown": "DMMA BMMA OMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    },
    "sync": {
        "none": "BAR SYNCS WARPSYNC WARPGROUP DEPBAR LDGDEPBAR LDTMDEPBAR MEMBAR FENCE UTCBAR UTMACMDFLUSH UTMACCTL "
        "BSSY BSYNC ERRBAR CCTL NANOSLEEP UCGABAR_ARV UCGABAR_WAIT ACQBULK"
    },
}
_CLASS = {op: (pipe, kind) for pipe, kinds in OPCODES.items() for kind, ops in kinds.items() for op in ops.split()}
# Lanes per clock and SM, by class.
LANES = {
    "fp32": (64, 128, 128, 128, 128),
    "fp32x2": (64, 64, 64, 64, 64),
    "fp16x2": (128, 64, 128, 128, 64),
    "imad": (64, 64, 64, 64, 64),
    "int": (64, 64, 64, 64, 64),
    "fp64": (32, 2, 64, 64, 2),
    "cvt64": (16, 2, 16, 16, 2),
    "mufu": (16, 16, 16, 16, 16),
    "pack": (64, 64, 64, 64, 64),
    "shuffle": (32, 32, 32, 32, 32),
    "redux": (16, 16, 16, 16, 16),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """One architecture: what an SM holds, and the device whose memory stands for it."""

    warps: int  # per SM
    ctas: int  # per SM
    shared: int  # bytes per SM, with RESERVED for every CTA
    shared_cta: int  # bytes a CTA may ask for
    mma: int  # dense 16-bit FLOP per clock and SM
    mma_sync: int | None  # the same through HMMA, or None where it is not known
    device: str
    dram: float  # bytes per clock and SM

    registers = 65536
    tensor_columns = 512  # of tensor memory per SM, on sm_100


SM = {
    80: Target(64, 32, 164 * 1024, 163 * 1024, 2048, 2048, "A100 80 GB", 13.4),
    89: Target(48, 24, 100 * 1024, 99 * 1024, 1024, 1024, "L40S", 2.4),
    # mma.sync cannot feed this tensor core: 62 % measured (Luo et al., arXiv 2402.13499); half, what sm_80 has, assumed
    90: Target(64, 32, 228 * 1024, 227 * 1024, 4096, 2048, "H100 SXM", 13.9),
    100: Target(64, 32, 228 * 1024, 227 * 1024, 8192, None, "B200", 29.1),
    120: Target(48, 24, 100 * 1024, 99 * 1024, 1024, 1024, "RTX PRO 6000", 3.7),
}
RESERVED = 1024  # bytes of shared memory that the system takes for every CTA


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@!P0", or nothing
    text: str  # "LDG.E.128 R8, desc[UR22][R2.64]"
    target: int | None = None  # the address that a branch or call goes to

    @property
    def mnemonic(self) -> str:
        return self.text.split()[0]

    @property
    def opcode(self) -> str:
        return self.mnemonic.split(".")[0]

    @property
    def pipe(self) -> str:
        return _classify(self)[0]


def disassemble(nvdisasm: str, cubins: Sequence[bytes], target: int) -> list[dict[str, list[Instruction]]]:
    """{kernel: its instructions} of each cubin, with the names the linker sees. All in one run, one kernel behind the
    other, and so are their addresses: nvdisasm takes a quarter of a second to start."""
    kernels = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.writelines(itertools.chain.from_iterable(each.values() for each in kernels))
        file.flush()
        architecture = f"SM{target}a" if target >= 90 else f"SM{target}"
        done = subprocess.run([nvdisasm, "-c", "-ndf", "-b", architecture, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    rest = iter(parse(done.stdout))
    return [
        {name: list(itertools.islice(rest, len(code) // BYTES_PER_INSTRUCTION)) for name, code in each.items()}
        for each in kernels
    ]


def _machine_code(cubin: bytes) -> dict[str, bytes]:
    """{kernel: its machine code} of a cubin: the sections .text.<kernel> of the ELF file, as elf.h lays it out."""
    (headers,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + i * size) for i in range(count)]
    found = {}
    for name, offset, length in sections:
        start = sections[names][1] + name
        title = cubin[start : cubin.index(b"\0", start)].decode()
        if title.startswith(".text."):
            found[title.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes per thread: what is spilled, and arrays that are indexed at run time
    shared: int  # static bytes, without RESERVED
    warps: int  # per CTA, at most: as many as a CTA can have where the source sets no bound


def resources(cuobjdump: str, cubin: str) -> dict[str, Resources]:
    """{kernel: what a CTA of it takes} of a cubin."""
    said = subprocess.run([cuobjdump, "-res-usage", "-elf", cubin], capture_output=True, text=True, check=True).stdout
    threads = {
        name: int(count, 16)
        for name, count in re.findall(
            r"^\.nv\.info\.(\S+)$(?:(?!^\.).*\n)*?.*EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*(0x\w+)", said, re.M
        )
    }
    found = {}
    for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", said):
        registers, stack, shared = map(int, numbers)
        # newer file formats count what the system reserves, too
        shared -= RESERVED if shared and ".nv.shared.reserved" in said else 0
        found[name] = Resources(registers, stack, shared, threads.get(name, 1024) // WARP)
    return found


def parse(text: str) -> list[Instruction]:
    """The instructions that `nvdisasm -b` prints."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?\w+\s+)?(.+?)\s*;", text, flags=re.MULTILINE)
    return [Instruction(int(at, 16), predicate.strip(), code, _branch_target(code)) for at, predicate, code in lines]


def _branch_target(text: str) -> int | None:
    # ptxas leaves some loops through CALL.REL.NOINC: a call may be a branch
    branch = re.match(r"(?:BRA|JMP|CALL)\b.*\b0x([0-9a-f]+)$", text)
    return int(branch[1], 16) if branch else None


def _successors(code: list[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    edges = []
    for i, instruction in enumerate(code):
        leaves = instruction.opcode in ("EXIT", "RET", "BRA", "JMP", "BRX", "JMX")
        # "BRA P1, `(label)", "BRA.U !UP0, `(label)" and "BRA.DIV ~URZ, `(label)" carry their condition themselves
        conditional = instruction.predicate or re.match(r"\S+\s+(!?U?P\d|~)", instruction.text)
        follows = [i + 1] if (conditional or not leaves) and i + 1 < len(code) else []
        edges.append(follows + ([index[instruction.target]] if instruction.target in index else []))
    return edges


def _walk(edges: list[list[int]]) -> tuple[set[int], list[tuple[int, int]]]:
    """Depth first from the entry: what is reached, and the edges that close a loop."""
    reached, path, closing, stack = {0}, {0}, [], [(0, iter(edges[0]))]
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if following in path:
                closing.append((node, following))
            elif following not in reached:
                reached.add(following)
                path.add(following)
                stack.append((following, iter(edges[following])))
                break
        else:
            path.remove(node)
            stack.pop()
    return reached, closing


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that touch memory or the matrix unit, longest first: spinning on a barrier is not a loop."""
    edges = _successors(code)
    before = collections.defaultdict(list)
    for node, following in enumerate(edges):
        for each in following:
            before[each].append(node)
    reached, closing = _walk(edges)
    bodies = {}
    for last, head in closing:
        body, todo = bodies.setdefault(head, {head}), [last]
        while todo:
            node = todo.pop()
            if node not in body and node in reached:
                body.add(node)
                todo += before[node]
    works = [b for b in bodies.values() if any(code[i].pipe in ("smem", "gmem", "mma") for i in b)]
    inner = [b for b in works if not any(other < b for other in works)]
    return sorted(([code[i] for i in sorted(b)] for b in inner), key=lambda b: (-len(b), b[0].address))


def body(code: list[Instruction]) -> list[Instruction]:
    """What a kernel without loops runs: without the padding behind its last EXIT."""
    reached, _ = _walk(_successors(code))
    return [code[i] for i in sorted(reached)]


def _classify(instruction: Instruction) -> tuple[str, str]:
    wide = ".F64" if re.search(r"\.[FSU]64", instruction.mnemonic) else ""
    return _CLASS.get(instruction.opcode + wide) or _CLASS.get(instruction.opcode, ("other", "none"))


def count(code: list[Instruction]) -> dict[str, int]:
    """Instructions per warp and pipe; `issue` is all of them."""
    return {**dict.fromkeys(PIPES, 0), **collections.Counter(i.pipe for i in code), "issue": len(code)}


def clocks(code: list[Instruction], target: int, warps: int) -> dict[str, float]:
    """Clocks that one pass of a CTA of so many warps occupies each pipe of its SM; NaN where a rate is not known."""
    total = {**dict.fromkeys(PIPES, 0.0), "issue": len(code) * warps / ISSUE}
    for instruction in code:
        pipe, kind = _classify(instruction)
        total[pipe] += warps * _cost(instruction, kind, target)
    return total


def _cost(instruction: Instruction, kind: str, target: int) -> float:
    """Clocks of one warp's instruction on its pipe."""
    if kind == "none":
        return 0.0
    if kind == "unknown":
        return math.nan
    if kind == "bytes":
        return WARP * access_bytes(instruction.mnemonic) / BYTES
    if kind == "mma":
        return _matrix_clocks(instruction.mnemonic, target)
    return WARP / LANES[kind][TARGETS.index(target)]


def access_bytes(mnemonic: str) -> int:
    """Bytes that a load or store moves per lane; at least the four that a lane's bank or sector slot is wide."""
    if matrices := re.search(r"\.MT?\d+(?:\.(\d))?(?:\.|$)", mnemonic):
        return 4 * int(matrices[1] or 1)
    width = re.search(r"\.(64|128|256)(?:\.|$)", mnemonic)
    return int(width[1]) // 8 if width else 4


def _matrix_clocks(mnemonic: str, target: int) -> float:
    # a 64xNxK product is one of four warps; m16n8kK is a warp's own
    if group := re.search(r"\.64x(\d+)x(\d+)", mnemonic):
        flop, rate = 2 * 64 * int(group[1]) * int(group[2]) / 4, SM[target].mma
    elif (own := re.search(r"\.168(\d+)", mnemonic)) and ".SP" not in mnemonic:
        flop, rate = 2 * 16 * 8 * int(own[1]), SM[target].mma_sync
    else:
        return math.nan
    if rate is None:
        return math.nan
    narrow = mnemonic.startswith(("I", "Q"))  # 8-bit operands at twice the rate, TF32 at half of it
    return flop / (rate * (2 if narrow else 0.5 if ".TF32" in mnemonic else 1))


def binding(pipes: dict[str, float]) -> str:
    """The pipe that needs most clocks, with a question mark where some pipe's are unknown."""
    known = {pipe: value for pipe, value in pipes.items() if not math.isnan(value)}
    return max(known, key=known.get) + "?" * (len(known) < len(pipes))


def residency(target: int, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> tuple[int, str]:
    """(CTAs that fit one SM, the first resource that runs out)."""
    sm = SM[target]
    # registers come in units of 256 for a warp, and warps in fours, one for each scheduler
    fitting = sm.registers // (math.ceil(registers * WARP / 256) * 256) // ISSUE * ISSUE
    limits = {
        "regs": fitting // warps,
        "shared": sm.shared // (math.ceil(shared / 128) * 128 + RESERVED),
        "warps": sm.warps // warps,
        "CTAs": sm.ctas,
    }
    if tensor_columns:
        limits["tensor"] = sm.tensor_columns // tensor_columns
    limit = min(limits, key=limits.get)
    return limits[limit], limit
