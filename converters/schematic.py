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
    """Bytes a call: {"dram_read_bytes", "dram_write_bytes", "vtcm_read_bytes", "vtcm_write_bytes", "operations"}.

    Raises:
      UserError: the file holds no operation with its traffic.
    """
    operations = _OPERATION.findall(path.read_bytes())
    if not operations:
        raise UserError(
            f"{path.name}: the compiler's schematic lists no memory traffic; is onnxruntime-qnn another one?"
        )
    totals = dict.fromkeys(FIELDS, 0)
    for operation in operations:
        for name, value in _FIELD.findall(operation):
            if name.decode() in totals:
                totals[name.decode()] += int(value)
    return {**{f"{name}_bytes": total for name, total in totals.items()}, "operations": len(operations)}
