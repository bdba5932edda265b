"""Memory traffic of a compiled graph, as the Hexagon compiler itself plans it.

With `profiling_level=optrace` the compiler leaves a text file `*_schematic.bin` in its working directory: the graph
before and after its optimisation and, for every operator that it will run, the bytes between DRAM and the NPU's own
memory (VTCM).
"""

import re
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError

_OPERATION = re.compile(rb'^\{"opid" : 0x[0-9a-f]+ ,([^\n}]*)\}', re.MULTILINE)
_FIELD = re.compile(rb'"(\w+)": (\d+)')
FIELDS = ("dram_read", "dram_write", "vtcm_read", "vtcm_write")


def traffic(path: Path) -> dict[str, Any]:
    """Bytes a call: {"dram_read_bytes", "dram_write_bytes", "vtcm_read_bytes", "vtcm_write_bytes", "operations",
    "outside_read_bytes", "outside_write_bytes"}.

    The last two are the part of the DRAM bytes that no DMA moves: of operators whose tensors are not in VTCM. Each
    lists its whole tensors, also where presumably it works on a slice, so a large part says that the sum is too large.

    Raises:
      UserError: the file holds no operation with its traffic.
    """
    operations = _OPERATION.findall(path.read_bytes())
    if not operations:
        raise UserError(
            f"{path.name}: the compiler's schematic lists no memory traffic; is onnxruntime-qnn another one?"
        )
    totals = dict.fromkeys((*FIELDS, "outside_read", "outside_write"), 0)
    for operation in operations:
        numbers = {name.decode(): int(value) for name, value in _FIELD.findall(operation)}
        for name in FIELDS:
            totals[name] += numbers.get(name, 0)
        if not numbers.get("is_dma"):
            totals["outside_read"] += numbers.get("dram_read", 0)
            totals["outside_write"] += numbers.get("dram_write", 0)
    return {**{f"{name}_bytes": total for name, total in totals.items()}, "operations": len(operations)}
