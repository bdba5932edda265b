"""Reading a program in XLA's text form: how often every instruction runs, and what its matrix products cost a device.

The text to read is the one after XLA's partitioner (`spmd-partitioning`): its shapes are those of one device, its
collectives are there, and nothing is fused, merged or pipelined yet. In the final program a collective is two
instructions, a loop is partly unrolled, and neither could be counted.

    runs(body of a while) = runs(while) x trips,    trips = (limit - start) / step of its counter                 (1)
    bytes(product) = operands + result: each passes the memory of the device once                                 (2)
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
# What JAX names the operations that a backward pass computes a second time.
RECOMPUTED = "rematted_computation"
# Products of [queries, keys] in one call of a splash attention kernel (`models.attention`).
KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`; `operands` are names."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: name -> instructions of every computation, and the one that starts.

    Attributes:
      open_loops: names of the `while` instructions without a trip count of (1); their bodies count once.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def _counted(self) -> tuple[Counter, Counter, tuple[str, ...]]:
        runs, again, unknown = Counter(), Counter(), []
        self._visit(self.entry, 1, False, runs, again, unknown)
        return runs, again, tuple(unknown)

    @property
    def open_loops(self) -> tuple[str, ...]:
        return self._counted[2]

    def recomputed_runs(self, computation: str) -> int:
        """How many of the runs are of a caller that repeats something for the backward pass."""
        return self._counted[1][computation]

    def executed(self) -> Iterator[tuple[int, str, Instruction]]:
        """(runs, computation, instruction) of everything that runs; all branches of a conditional do."""
        for name, runs in self._counted[0].items():
            for instruction in self.computations[name]:
                yield runs, name, instruction

    def shapes(self, computation: str) -> dict[str, str]:
        """Instruction name -> its shape, as text."""
        return {i.name: i.shape for i in self.computations[computation]}

    def _visit(self, name: str, runs: int, again: bool, total: Counter, repeated: Counter, unknown: list[str]) -> None:
        total[name] += runs
        repeated[name] += again * runs
        for instruction in self.computations[name]:
            repeats = again or RECOMPUTED in instruction.attributes
            for called, trips in self._called(name, instruction, unknown):
                if called in self.computations:
                    self._visit(called, runs * trips, repeats, total, repeated, unknown)

    def _called(self, computation: str, instruction: Instruction, unknown: list[str]) -> list[tuple[str, int]]:
        loop = _LOOP.search(instruction.attributes)
        if instruction.opcode == "while" and loop:
            known = _KNOWN_TRIPS.search(instruction.attributes)
            trips = int(known.group(1)) if known else self._trips(computation, instruction, *loop.groups())
            if trips is None:
                unknown.append(instruction.name)
            return [(loop.group(2), 1 if trips is None else trips)]
        names = _CALLED.findall(instruction.attributes)
        for group in _BRANCHES.findall(instruction.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return [(name, 1) for name in names]

    def _trips(self, computation: str, loop: Instruction, condition: str, body: str) -> int | None:
        """Of a counter that is an entry of the loop's tuple, compared with a constant and raised by one."""
        inside, after, outside = (self._by_name(name) for name in (condition, body, computation))
        found = []
        for compare in inside.values():
            direction = re.search(r"direction=(L[TE])", compare.attributes)
            if compare.opcode != "compare" or not direction:
                continue
            counter, limit = inside.get(compare.operands[0]), _constant(inside.get(compare.operands[1]))
            entry = _entry(counter)
            if limit is None or entry is None:
                continue
            start = _constant(_tuple_entry(outside.get(loop.operands[0]), entry, outside))
            root = next((i for i in after.values() if i.root), None)
            step = _raised_by(_tuple_entry(root, entry, after), entry, after)
            if start is not None and step:
                found.append(-(-(limit + (direction.group(1) == "LE") - start) // step))
        return min(found, default=None)

    def _by_name(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations.get(computation, ())}


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    number = re.match(r"(-?\d+)\)", instruction.attributes)
    return int(number.group(1)) if number else None


def _entry(instruction: Instruction | None) -> int | None:
    """k of `get-tuple-element(x), index=k`."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes).group(1))


def _tuple_entry(instruction: Instruction | None, entry: int, among: dict[str, Instruction]) -> Instruction | None:
    if instruction is None or instruction.opcode != "tuple" or entry >= len(instruction.operands):
        return None
    return among.get(instruction.operands[entry])


def _raised_by(instruction: Instruction | None, entry: int, among: dict[str, Instruction]) -> int | None:
    """What a chain of additions adds to an entry of the loop's tuple; XLA unrolls some of its own loops by two."""
    total = 0
    while instruction is not None and instruction.opcode == "add":
        sides = [among.get(name) for name in instruction.operands]
        added = [number for number in map(_constant, sides) if number is not None]
        total += sum(added)
        instruction = next((side for side in sides if _constant(side) is None), None)
    return total if _entry(instruction) == entry else None


def parse(text: str) -> Module:
    """A module of its text.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    current, entry, lines = "", "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current, lines = header.group(2), []
            entry = current if header.group(1) else entry
        elif line.startswith("}") and not line.startswith("}}") and current:
            computations[current], current = tuple(lines), ""
        elif current:
            match = _INSTRUCTION.match(line)
            if not match and lines:  # Attributes of a kernel are written on several lines.
                lines[-1] = dataclasses.replace(lines[-1], attributes=lines[-1].attributes + line)
            if match:
                root, name, shape, opcode, rest = match.groups()
                inside = rest[: _closing(rest)]
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                attributes = rest if opcode == "constant" else rest[len(inside) :]
                lines.append(Instruction(name, shape, opcode, operands, attributes, bool(root)))
    if entry not in computations:
        raise ValueError("this is no text of an XLA program: it has no ENTRY computation")
    return Module(computations, entry)


def _closing(text: str) -> int:
    """Where the parenthesis ends that was opened in front of the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of every array of a shape, which may be a tuple of several."""
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(shape)]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape, without padding."""
    return sum(-(-math.prod(sizes) * _item_bits(dtype) // 8) for dtype, sizes in arrays(shape))


def _item_bits(dtype: str) -> int:
    """Of bf16, f32, s4, f8e4m3fn and the like, the first number is the size."""
    if dtype in ITEM_BITS:
        return ITEM_BITS[dtype]
    return int(re.search(r"\d+", dtype).group())


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products and convolutions of one call on one device.

    Attributes:
      flops: operations, those of splash attention kernels included.
      recomputed_flops: those of them that a backward pass repeats to save memory.
      bytes: equation 2, of custom kernels too.
    """

    flops: int
    recomputed_flops: int
    bytes: int


def products(module: Module) -> Products:
    """Of all that runs. What kernels read and write counts, their operations only in splash attention."""
    flops = recomputed = moved = 0
    shapes = functools.cache(module.shapes)
    for runs, computation, instruction in module.executed():
        kernel = "tpu_custom_call" in instruction.attributes
        if instruction.opcode not in ("dot", "convolution") and not kernel:
            continue
        operands = [shapes(computation)[name] for name in instruction.operands]
        moved += runs * (shape_bytes(instruction.shape) + sum(map(shape_bytes, operands)))
        own = (_kernel_flops if kernel else _product_flops)(instruction, operands)
        again = RECOMPUTED in instruction.attributes
        flops += runs * own
        recomputed += own * (runs if again else module.recomputed_runs(computation))
    return Products(flops, recomputed, moved)


def _kernel_flops(instruction: Instruction, operands: list[str]) -> int:
    """By formula: the first operands are queries [..., H, L, K] and keys [..., H, S, K]; every pair is computed."""
    count = next((n for name, n in KERNEL_PRODUCTS.items() if f"/{name}" in instruction.attributes), 0)
    if not count:
        return 0
    (_, query), (_, key) = (arrays(shape)[0] for shape in operands[:2])
    return 2 * count * math.prod(query) * key[-2]


def _product_flops(instruction: Instruction, operands: list[str]) -> int:
    result = math.prod(arrays(instruction.shape)[0][1])
    left, right = (arrays(shape)[0][1] for shape in operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
        return 2 * result * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=[^_]*_([^-]*)->", instruction.attributes).group(1)
    dilation = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    sparse = math.prod(int(n) for n in dilation.group(1).split("x")) if dilation else 1
    return 2 * result * math.prod(right) // right[labels.index("o")] // sparse
