"""What the devices of a partitioned program tell each other: collectives by kind, with count, bytes and traffic.

Of n devices in a group, with R the bytes of the result on each, a ring has to bring every device

    all-gather      R (n - 1) / n          all-to-all           R (n - 1) / n                                    (1)
    reduce-scatter  R (n - 1)              collective-permute   R                                                (2)
    all-reduce      2 R (n - 1) / n        (a reduce-scatter, then an all-gather)                                (3)

The program is read as the partitioner leaves it (`hlo`). Later passes merge collectives of one operand and turn an
all-reduce of which every device keeps its part alone into a reduce-scatter; here they count as that.

Where a product would wait for a gathered kernel, or its result is scattered, XLA for TPUs may pass the parts round a
ring one by one and multiply meanwhile. Those permutations are an all-gather or a reduce-scatter under way, and count
apart from others, as `WINDOWED`.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from nd_jax.train.hlo import Instruction, Module, arrays, shape_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
WINDOWED = "windowed-einsum"
# Names that two instructions may differ in and still be the same.
_INCIDENTAL = re.compile(r"(, )?(channel_id=\d+|metadata=\{[^}]*\}|backend_config=.*$|frontend_attributes=\{[^}]*\})")
_OF_A_PRODUCT = re.compile(r'op_name="[^"]*dot_general"')
# Numbers from 0 up as an array of the first sizes, its axes in the second order.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, dtype and group size in one call, on one device.

    Attributes:
      kind: one of `KINDS`, or `WINDOWED`.
      dtype: in XLA's spelling, such as "bf16".
      devices: n, of a group.
      across_slices: whether a group has devices of several slices.
      count: how often they run.
      bytes: R, of all runs together.
      traffic: equations 1 to 3.
    """

    kind: str
    dtype: str
    devices: int
    across_slices: bool
    count: int
    bytes: int
    traffic: int


def collectives(module: Module, devices: int, slices: int = 1) -> list[Collective]:
    """Those of everything that runs, the largest traffic first.

    Args:
      module: after the partitioner.
      devices: of the program.
      slices: of equal size; partition p is on slice p // (devices / slices).
    """
    totals: dict[tuple, list[int]] = {}
    seen = set()
    users = functools.cache(functools.partial(_users, module))
    for runs, computation, instruction in module.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        same = (computation, kind, instruction.shape, instruction.operands, _INCIDENTAL.sub("", instruction.attributes))
        if same in seen:
            continue
        seen.add(same)
        groups = device_groups(instruction, devices)
        size = max(map(len, groups))
        apart = any(len({device * slices // devices for device in group}) > 1 for group in groups)
        result = _result_bytes(instruction)
        if kind == "collective-permute" and _OF_A_PRODUCT.search(instruction.attributes) and _ring(groups):
            kind, size = WINDOWED, _ring(groups)
        elif kind == "all-reduce" and _is_cut(users(computation).get(instruction.name, []), result, size):
            kind, result = "reduce-scatter", result // size
        total = totals.setdefault((kind, arrays(instruction.shape)[0][0], size, apart), [0, 0, 0])
        for k, value in enumerate((1, result, _traffic(kind, result, size))):
            total[k] += runs * value
    found = [Collective(*key, *values) for key, values in totals.items()]
    return sorted(found, key=lambda c: c.traffic, reverse=True)


def _users(module: Module, computation: str) -> dict[str, list[Instruction]]:
    """Instruction name -> the instructions of its computation that read it."""
    users: dict[str, list[Instruction]] = {}
    for instruction in module.computations[computation]:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    return users


def _is_cut(users: Sequence[Instruction], result: int, size: int) -> bool:
    """Whether all that becomes of a result is one part of `size` equal ones."""
    whole = lambda user: user.opcode != "dynamic-slice" or shape_bytes(user.shape) * size != result
    return bool(users) and size > 1 and not any(map(whole, users))


def _ring(pairs: Sequence[Sequence[int]]) -> int:
    """Devices of the ring that (source, target) pairs go round, 0 where they do not end where they began."""
    after, (start, at), length = dict(pairs), pairs[0], 1
    while at != start and at in after:
        at, length = after[at], length + 1
    return length if at == start else 0


def _result_bytes(instruction: Instruction) -> int:
    """Of an asynchronous start, whose shape lists operand and result, the larger of the two."""
    if instruction.opcode.endswith("-start"):
        return max(shape_bytes(f"{dtype}[{','.join(map(str, n))}]") for dtype, n in arrays(instruction.shape))
    return shape_bytes(instruction.shape)


def _traffic(kind: str, result: int, size: int) -> int:
    if size == 1:
        return 0
    if kind == "all-reduce":
        return 2 * result * (size - 1) // size
    if kind == "reduce-scatter":
        return result * (size - 1)
    if kind in ("collective-permute", "collective-broadcast", WINDOWED):
        return result
    return result * (size - 1) // size


def device_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Groups of partition numbers of a collective, in any of XLA's spellings.

    One group of all where it names none, and where the spelling is a new one: more than that it cannot be.
    """
    text = instruction.attributes
    everyone = [list(range(devices))]
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
    if pairs:
        return _lists(pairs.group(1)) or everyone
    listed = re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", text)
    if listed:
        return _lists(listed.group(1)) or everyone
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text)
    if iota:
        shape, source, order = (_numbers(part) for part in iota.groups())
        return _iota(source, order).reshape(shape).tolist()
    mesh = re.search(r"replica_groups=@?mesh\d*\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}", text)
    return _mesh_groups(*mesh.groups()) if mesh else everyone


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", text)]


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").replace(" ", "").split(",") if n]


def _iota(sizes: list[int], order: list[int]) -> np.ndarray:
    """`[2,4]T(1,0)`: 0 to 7 as an array of these sizes, its axes in that order."""
    return np.arange(int(np.prod(sizes))).reshape(sizes).transpose(order or range(len(sizes)))


def _mesh_groups(sizes: str, devices: str | None, chosen: str) -> list[list[int]]:
    """`'a'=2,'b'=8`, the devices in the order of that mesh (a list, or as `_iota`, or from 0 up), and the axes that a
    group spans: `'b'`, or a part of it, `'b':(2)4`, 4 behind the first 2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        parts.setdefault(name, []).append((int(before or 1), int(size or axes[name])))
    shape: list[int] = []
    inside: list[int] = []
    for name, size in axes.items():
        done = 1
        for before, length in sorted(parts.get(name, [])):
            shape += [before // done, length]
            inside.append(len(shape) - 1)
            done = before * length
        shape.append(size // done)
    iota = re.fullmatch(_IOTA, devices or f"[{np.prod(shape)}]")
    ids = (_iota(*map(_numbers, iota.groups())) if iota else np.array(_numbers(devices))).reshape(shape)
    group = int(np.prod([shape[axis] for axis in inside]))
    outside: Sequence[int] = [axis for axis in range(len(shape)) if axis not in inside]
    return ids.transpose([*outside, *inside]).reshape(-1, group).tolist()
