"""TPU chips as a handful of numbers, and the shortest time that a step can take on them (roofline).

    time >= operations / peak,   bytes to and from memory / bandwidth,   traffic / bandwidth of the links         (1)

(1) is what the hardware cannot beat. All links of a chip are counted as if every collective could use all of them, and
all three as if they overlapped entirely; real steps take two to three times as long.
"""

import dataclasses
from collections.abc import Mapping

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it, which on v4 and tpu7x is one of the two cores of a chip.

    Attributes:
      name: as in a topology, "v5p".
      hbm_bytes: what the compiler of libtpu 0.0.52 lets a program use.
      flops: peak of bfloat16 products, operations per second.
      hbm_bandwidth: bytes per second.
      ici_bandwidth: of all links to other chips of the slice, one direction, bytes per second.
      dcn_bandwidth: to other slices, bytes per second.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float


def _chip(name: str, hbm_gib: float, tflops: float, hbm: float, ici: float, dcn: float, cores: int = 1) -> Chip:
    """Bandwidths in GB/s and of a whole chip; `hbm_gib` of a device."""
    rates = (value / cores for value in (1e12 * tflops, 1e9 * hbm, 1e9 * ici, 1e9 * dcn))
    return Chip(name, int(hbm_gib * GIB), *rates)


# Peak, memory and links: "Key specifications" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, November 2025;
# their "bidirectional ICI bandwidth" halved. Between slices: the same pages (v5e 6.4 Tb/s for 256 chips, v5p 50 Gb/s a
# chip, v6e and tpu7x 100 Gb/s); v4 as v5e. Usable memory: what the compiler reports when a program does not fit.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v4", 15.25, 275, 1200, 300, 3.125, cores=2),
        _chip("v5e", 15.75, 197, 819, 200, 3.125),
        _chip("v5p", 95.73, 459, 2765, 600, 6.25),
        _chip("v6e", 31.24, 918, 1638, 400, 12.5),
        _chip("tpu7x", 94.74, 2307, 7380, 600, 12.5, cores=2),
    )
}

# What JAX calls a device -> its chip of the table above.
TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
# Dense bfloat16 products of NVIDIA's data sheets (SXM).
GPU_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of bfloat16 products of a device, operations per second; None of one that is not in the tables."""
    chip = CHIPS.get(TPU_KINDS.get(device_kind, ""))
    return chip.flops if chip else GPU_FLOPS.get(device_kind)


def roofline(chip: Chip, flops: float, hbm_bytes: float, ici_bytes: float, dcn_bytes: float) -> Mapping[str, float]:
    """Equation 1 of a step on one device, in seconds.

    Returns:
      {"compute", "hbm", "ici", "dcn"}: the bounds.
    """
    return {
        "compute": flops / chip.flops,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "ici": ici_bytes / chip.ici_bandwidth,
        "dcn": dcn_bytes / chip.dcn_bandwidth,
    }
