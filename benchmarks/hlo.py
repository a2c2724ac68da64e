"""The loops, products, memory traffic and collectives of a compiled program, from its text.

Reads the text of optimized HLO (`compiled.as_text()`), of any backend. Nothing is run. XLA's own
`cost_analysis` counts the body of a loop once, however often it runs, and does not tell traffic
to main memory from traffic inside the chip; this does both.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
PASSES = {"default": 1, "high": 3, "highest": 6}
"""bfloat16 passes that a TPU makes for one product of float32 (see `jax.lax.Precision`)."""
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_PARTS = {"dynamic-slice", "gather", "slice"}


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    layout: str
    """Between braces: order of the dimensions, minor first; tiles; memory space."""

    @property
    def bytes(self) -> float:
        """Without padding."""
        return BYTES.get(self.dtype, 0) * math.prod(self.dims)

    @property
    def main_memory_bytes(self) -> float:
        """Padded to its tiles as a TPU stores it; 0 in another memory space than main memory."""
        if re.search(r"S\([1-9]", self.layout):
            return 0.0
        dims = list(self.dims)
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        if dims and tile:
            order = [int(d) for d in self.layout.split(":")[0].split(",")]
            sizes = reversed([int(size) for size in tile[1].split(",")])
            for dim, size in zip(order, sizes, strict=False):
                dims[dim] = -(-dims[dim] // size) * size
        return BYTES.get(self.dtype, 0) * math.prod(dims)


class Instruction(NamedTuple):
    """One line."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    """The text between the parentheses: the operands, or a constant's value."""
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result, tuples flattened."""
        found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", self.shape)
        return [
            Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout)
            for dtype, dims, layout in found
        ]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in what follows the operands."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


class Computation(NamedTuple):
    """A block of instructions by name."""

    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result it returns."""
        return next(i for i in self.instructions.values() if i.is_root)


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Executed(NamedTuple):
    """An instruction, where it stands and how often it runs."""

    instruction: Instruction
    computation: Computation
    times: float


class Collective(NamedTuple):
    """A communication between devices."""

    kind: str
    bytes: float
    """Size of the whole array on each device: reduced; gathered; or before it is scattered."""
    devices: int
    """That take part together."""
    times: float


def parse(text: str) -> Module:
    """Read a program."""
    computations: dict[str, Computation] = {}
    entry = ""
    block: dict[str, Instruction] = {}
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            block = {}
            computations[header[2]] = Computation(block)
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            block[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"^\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    # Some printers write an operand's shape before its name.
    inside = rest[opened + 1 : closed]
    names = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(
        start[2], shape, rest[:opened], names, inside, rest[closed + 1 :], bool(start[1])
    )


def _closing(text: str, opened: int) -> int:
    """The place at which the parenthesis closes that opens here."""
    depth = 0
    for place in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def executed(
    module: Module, *, unknown_trips: float, into_fusions: bool = False
) -> Iterator[Executed]:
    """Every instruction that runs, with how often it does.

    Args:
        module: The program.
        unknown_trips: How often loops run whose end only the data know.
        into_fusions: Also what is fused; without it a fusion is one instruction.
    """
    yield from _executed(module, module.entry, 1.0, unknown_trips, into_fusions)


def _executed(
    module: Module, name: str, times: float, unknown: float, into_fusions: bool
) -> Iterator[Executed]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        yield Executed(instruction, computation, times)
        inner = times
        if instruction.opcode == "while":
            known = trip_count(module, instruction)
            inner = times * (unknown if known is None else known)
        elif instruction.opcode == "fusion" and not into_fusions:
            continue
        tested = instruction.attribute(r"condition=%?([\w.\-]+)")
        for called in _called(instruction):
            # The condition is looked at once more, to end the loop.
            often = inner + times if called == tested else inner
            yield from _executed(module, called, often, unknown, into_fusions)


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs; those applied to single numbers left out."""
    if instruction.opcode in ("while", "fusion", "call", "async-start", "custom-call"):
        pattern = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
        return re.findall(pattern, instruction.attributes)
    if instruction.opcode == "conditional":
        branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
        either = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
        return either + re.findall(r"%?([\w.\-]+)", branches or "")
    return []


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Passes of a loop, if the compiler says so or its condition counts up to a constant."""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    bound = condition.instructions[root.operands[1]]
    if bound.opcode != "constant":
        return None
    return int(bound.inside)  # `jax.lax.scan` and `fori_loop` count from 0 by 1


def matmul_flops(module: Module, *, unknown_trips: float = 1.0) -> dict[str, float]:
    """FLOPs of all products and convolutions, by what a TPU needs for them.

    A multiply-add is two FLOPs. Elementwise work and factorizations count nothing, nor do
    products handed to a library, as they are on GPUs.

    Returns:
        FLOPs under "default", "high" and "highest", the precision of float32 operands; products
        of narrower ones are "default", which for a TPU they are.
    """
    totals = dict.fromkeys(PASSES, 0.0)
    for at in executed(module, unknown_trips=unknown_trips, into_fusions=True):
        count = {"dot": _dot_flops, "convolution": _convolution_flops}.get(at.instruction.opcode)
        if count:
            totals[_precision(at)] += at.times * count(at)
    return totals


def _precision(at: Executed) -> str:
    kinds = {at.computation.instructions[name].arrays[0].dtype for name in at.instruction.operands}
    named = at.instruction.attribute(r"operand_precision=\{([\w,]+)\}")
    if named is None or "f32" not in kinds:
        return "default"
    return max(named.split(","), key=lambda name: PASSES[name])


def _dot_flops(at: Executed) -> float:
    lhs = at.computation.instructions[at.instruction.operands[0]].arrays[0].dims
    summed = at.instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    inner = math.prod(lhs[int(axis)] for axis in summed.split(",") if axis)
    return 2.0 * math.prod(at.instruction.arrays[0].dims) * inner


def _convolution_flops(at: Executed) -> float:
    """TPUs write every product as a convolution, a batch of them as one with holes."""
    lhs, rhs = (at.computation.instructions[n].arrays[0].dims for n in at.instruction.operands)
    out = at.instruction.arrays[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.instruction.attributes)
    assert labels
    in_label, kernel_label, out_label = labels.groups()
    groups = int(at.instruction.attribute(r"batch_group_count=(\d+)") or 1)
    positions = 1
    for axis in (label for label in out_label if label.isdigit()):
        positions *= _positions(
            lhs[in_label.index(axis)],
            rhs[kernel_label.index(axis)],
            out[out_label.index(axis)],
            _Window.read(at.instruction.attributes, int(axis)),
        )
    features = rhs[kernel_label.index("i")] * out[out_label.index("f")]
    return 2.0 * features * (lhs[in_label.index("b")] // groups) * positions


class _Window(NamedTuple):
    """The way a convolution moves along one axis."""

    stride: int
    pad: int
    lhs_dilate: int
    rhs_dilate: int

    @classmethod
    def read(cls, attributes: str, axis: int) -> "_Window":
        window = re.search(r"window=\{([^}]*)\}", attributes)
        fields = dict(field.split("=") for field in window[1].split()) if window else {}

        def field(name: str, default: str) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        return cls(
            int(field("stride", "1")),
            int(field("pad", "0_0").split("_")[0]),
            int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )


def _positions(lhs: int, kernel: int, out: int, window: _Window) -> int:
    """Pairs of an output and a kernel element that meet data, not padding or a hole."""
    width = (lhs - 1) * window.lhs_dilate + 1
    count = 0
    for element in range(kernel):
        offset = element * window.rhs_dilate - window.pad
        for place in range(out):
            at = place * window.stride + offset
            count += 0 <= at < width and at % window.lhs_dilate == 0
    return count


def main_memory_bytes(module: Module, *, unknown_trips: float = 1.0) -> float:
    """Bytes read from and written to main memory: HBM on a TPU.

    Each instruction reads its operands and writes its results, as far as they are in main
    memory; a fusion is one instruction, of which an operand that it only slices or gathers from
    counts by what it takes. Copies to and from the chip's own memory count by what they move.
    """
    return sum(
        at.times * _traffic(module, at)
        for at in executed(module, unknown_trips=unknown_trips)
        if at.instruction.opcode not in _FREE and not at.instruction.opcode.endswith("-done")
    )


def _traffic(module: Module, at: Executed) -> float:
    instruction, own = at.instruction, at.instruction.arrays
    sources = [
        sum(array.main_memory_bytes for array in at.computation.instructions[name].arrays)
        for name in instruction.operands
    ]
    written = sum(array.main_memory_bytes for array in own)
    if instruction.opcode == "copy-start":
        return sum(array.main_memory_bytes for array in own[:2])
    if instruction.opcode == "slice-start":
        moved = own[-2]._replace(layout=re.sub(r"S\(\d+\)", "", own[-2].layout)).main_memory_bytes
        return moved * ((sources[0] > 0) + (own[-2].main_memory_bytes > 0))
    if instruction.opcode in _PARTS:
        return min(sources[0], written or own[0].bytes) + sum(sources[1:]) + written
    if instruction.opcode == "dynamic-update-slice":
        return sources[1] + min(sources[1] or written, written) + sum(sources[2:])
    if instruction.opcode.endswith("-start"):
        return written  # operands and results together
    if instruction.opcode != "fusion":
        return sum(sources) + written
    body = module.computations[instruction.attribute(r"calls=%?([\w.\-]+)") or ""]
    read = sum(min(source, _taken(body, number, source)) for number, source in enumerate(sources))
    root = body.root
    if root.opcode == "dynamic-update-slice":
        update = sum(array.bytes for array in body.instructions[root.operands[1]].arrays)
        written = min(written, update)
    return read + written


def _taken(body: Computation, number: int, whole: float) -> float:
    """Bytes that a fusion reads of a parameter."""
    parameter = next(
        i.name
        for i in body.instructions.values()
        if i.opcode == "parameter" and i.inside == str(number)
    )
    users = [i for i in body.instructions.values() if parameter in i.operands]
    if users and all(user.opcode in _PARTS and user.operands[0] == parameter for user in users):
        return sum(array.bytes for user in users for array in user.arrays)
    if users and all(
        user.opcode == "dynamic-update-slice" and user.operands[0] == parameter for user in users
    ):
        return 0.0
    return whole


def collectives(module: Module, *, devices: int, unknown_trips: float = 1.0) -> list[Collective]:
    """Every communication between devices, in fusions too.

    Args:
        module: The program.
        devices: How many there are in all.
        unknown_trips: How often loops run whose end only the data know.
    """
    found = []
    for at in executed(module, unknown_trips=unknown_trips, into_fusions=True):
        kind = at.instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sent = sum(
                array.bytes
                for name in at.instruction.operands
                for array in at.computation.instructions[name].arrays
            )
            group = _group_size(at.instruction, devices)
            whole = sent * group if kind == "all-gather" else sent
            found.append(Collective(kind, whole, group, at.times))
    return found


def _group_size(instruction: Instruction, devices: int) -> int:
    if shape := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(shape)
    if first := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return len(first.split(","))
    return devices


def sent_bytes(collective: Collective) -> float:
    """Bytes that each device must send, once: the least any algorithm of a ring can do with."""
    n, share = collective.devices, (collective.devices - 1) / collective.devices
    if collective.kind == "collective-permute":
        return collective.bytes
    return collective.bytes * share * (2 if collective.kind == "all-reduce" else 1) * (n > 1)


def estimated_cycles(module: Module, *, unknown_trips: float = 1.0) -> float:
    """The TPU compiler's own estimates, summed, in cycles; 0 from other compilers.

    It gives none for factorizations, gathers, copies in the background and communication.
    """
    pattern = r'"estimated_cycles":"(\d+)"'
    return sum(
        at.times * float(at.instruction.attribute(pattern) or 0)
        for at in executed(module, unknown_trips=unknown_trips)
    )


def custom_calls(module: Module) -> set[str]:
    """The names of what is called outside of HLO."""
    return {
        i.attribute(r'custom_call_target="([^"]+)"') or ""
        for computation in module.computations.values()
        for i in computation.instructions.values()
        if i.opcode == "custom-call"
    }
