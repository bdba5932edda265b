"""torchvision's VGG16 and a head file of the `lpips` package -> one component folder for LPIPS.

    python -m converters.import_lpips --trunk vgg16-397923af.pth --heads lpips/weights/v0.1/vgg.pth --output DIR/lpips

Nothing is downloaded. The trunk's classifier is left out. `OUTPUT/import.json` records both files and their hashes.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

from converters.byte_progress import byte_progress
from converters.torch_files import SUFFIXES, open_any_source
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text
from nd_jax.models.lpips import LPIPSConfig
from nd_jax.weights.folder import check_tensors, load_params, save_component
from nd_jax.weights.lpips import LPIPS_VGG16, TRUNK, check_heads, lpips_table
from nd_jax.weights.network import flat_shapes
from nd_jax.weights.sources import ShardedSource, TensorSource, hash_files
from nd_jax.weights.table import Tensor, expand, flatten

REPORT = "import.json"
TRUNK_REMEDY = "--trunk needs the state dict of torchvision's vgg16 (vgg16-397923af.pth)"
HEADS_REMEDY = "--heads needs lpips/weights/v0.1/vgg.pth out of the lpips package's wheel"


def import_lpips(trunk: Path, heads: Path, output: Path, config: LPIPSConfig | None = None) -> dict:
    """Writes the component folder and returns the report that `OUTPUT/import.json` holds.

    Args:
      trunk: VGG16's state dict, `features.N.weight` and `.bias`; `classifier` keys are ignored.
      heads: the package's head file, `linN.model.1.weight`.
      output: the component folder; one that is there is replaced.
      config: sizes, by default VGG16's.

    Raises:
      UserError: a file is absent, damaged or another one, or the output cannot be written.
    """
    begin = time.perf_counter()
    config = config or LPIPSConfig()
    tensors = list(expand(lpips_table(config), flat_shapes(LPIPS_VGG16, config)))
    of_trunk = lambda tensor: tensor.keys[0].startswith(TRUNK)
    with contextlib.ExitStack() as stack:
        sources = {}
        for name, path, wanted, remedy in (
            ("trunk", trunk, [t for t in tensors if of_trunk(t)], TRUNK_REMEDY),
            ("heads", heads, [t for t in tensors if not of_trunk(t)], HEADS_REMEDY),
        ):
            source = stack.enter_context(contextlib.closing(_open(path, remedy)))
            _check(source, wanted, path, remedy)
            sources[name] = source
        # Neither file refers to the other; their tensors are one source all the same.
        both = ShardedSource(output, sources)
        with byte_progress("import", _bytes(both, tensors)) as on_bytes:
            params = load_params(LPIPS_VGG16, config, both, f"{trunk} and {heads}", on_bytes=on_bytes)
    check_heads(params, str(heads))
    save_component(output, LPIPS_VGG16, config, params)
    arrays = flatten(params).values()
    report = {
        "sources": {
            name: {"file": path.name, "sha256": hash_files([path])}
            for name, path in (("trunk", trunk), ("heads", heads))
        },
        "widths": list(config.widths),
        "parameters": sum(array.size for array in arrays),
        "bytes": sum(array.nbytes for array in arrays),
        "seconds": time.perf_counter() - begin,
    }
    write_text(output / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def _open(path: Path, remedy: str) -> TensorSource:
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    return open_any_source(path)


def _check(source: TensorSource, tensors: list[Tensor], path: Path, remedy: str) -> None:
    try:
        check_tensors(LPIPS_VGG16, tensors, source, str(path))
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error


def _bytes(source: TensorSource, tensors: list[Tensor]) -> int:
    return sum(source.dtype(key).itemsize * math.prod(source.shape(key)) for tensor in tensors for key in tensor.keys)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.import_lpips",
        description="Make the folder of the perceptual distance LPIPS from the two files that it is published in. "
        "Nothing is downloaded.",
    )
    parser.add_argument(
        "--trunk",
        type=Path,
        required=True,
        help="state dict of torchvision's vgg16, "
        f"which torchvision calls vgg16-397923af.pth (.safetensors, {', '.join(SUFFIXES)})",
    )
    parser.add_argument(
        "--heads",
        type=Path,
        required=True,
        help="the lpips package's head file for VGG16: `pip download lpips --no-deps`, unzip the wheel, "
        "lpips/weights/v0.1/vgg.pth (v0.0 is for pictures in another range)",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; an older one is replaced")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    report = import_lpips(args.trunk, args.heads, args.output)
    print(
        f"imported lpips, {report['parameters']:,} parameters, {report['bytes'] / 1e6:.1f} MB in "
        f"{report['seconds']:.1f} s: {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
