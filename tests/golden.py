"""Runs golden cases: weights, inputs and outputs of the public code that ours must reproduce.

    python -m tests.golden DIR

A case is a pair NAME.safetensors (`w.KEY` weights, `in.NAME` inputs, `out.NAME` outputs) and NAME.json (`official`
class or functions, `config`, tolerances; for some, numbers in `data`). `official` decides how a case runs, not its
name, so cases of other sizes run as well. One line per case; the exit status is 1 when a case fails, is of an unknown
kind, or when there is none.

The error of an output is max |got - expected| / max |expected|.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nd_jax.errors import UserError
from nd_jax.models import t5
from nd_jax.weights import networks
from nd_jax.weights.networks import Network
from nd_jax.weights.safetensors_io import SafetensorsFile
from nd_jax.weights.sources import read_json
from tests import golden_first_frame, golden_mmdit, golden_pyramid, golden_rollout, golden_vae
from tests.golden_kinds import Arrays, Kind, tensors

# Numbers that the JSON states in full; what is left is the order of a float64 sum.
JSON_TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a case: the output with the largest error relative to its tolerance, or why the case did not run."""

    case: str
    output: str = "-"
    error: float = float("nan")
    tolerance: float = float("nan")
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason and self.error <= self.tolerance  # False for NaN.

    @property
    def share(self) -> float:
        """Error in units of the tolerance."""
        if self.tolerance == 0:
            return 0.0 if self.error == 0 else np.inf
        return float(np.nan_to_num(self.error / self.tolerance, nan=np.inf))

    def line(self) -> str:
        verdict = "ok" if self.ok else f"FAIL {self.reason}".rstrip()
        return f"{self.case:28} {self.output:20} error {self.error:9.2e}  tolerance {self.tolerance:8.1e}  {verdict}"


def _t5_encoder(config: t5.T5Config, params: dict, inputs: Arrays) -> dict[str, jax.Array]:
    apply = jax.jit(lambda p, ids, mask: t5.T5Encoder(config).apply({"params": p}, ids, mask, return_block_states=True))
    out = apply(params, inputs["input_ids"], inputs["attention_mask"])
    states = {f"hidden.{k}": out.block_states[k] for k in range(config.num_layers)}
    return {"last_hidden_state": out.hidden, **states}


def _distil_t5(config: t5.DistilT5Config, params: dict, inputs: Arrays) -> dict[str, jax.Array]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    encoder = jax.jit(lambda p: t5.T5Encoder(config.encoder).apply({"params": p["encoder"]}, ids, mask).hidden)
    whole = jax.jit(lambda p: t5.DistilT5(config).apply({"params": p}, ids, mask))
    return {"encoder_hidden": encoder(params), "prompt_embeds": whole(params)}


def _one_output(network: Network, name_in: str, name_out: str) -> Callable[[Any, dict, Arrays], dict[str, jax.Array]]:
    def outputs(config: Any, params: dict, inputs: Arrays) -> dict[str, jax.Array]:
        return {name_out: jax.jit(network.module(config).apply)({"params": params}, inputs[name_in])}

    return outputs


def _clip_text(config: Any, params: dict, inputs: Arrays) -> dict[str, jax.Array]:
    apply = jax.jit(networks.CLIP_TEXT.module(config).apply)
    return apply({"params": params}, inputs["input_ids"])._asdict()


KINDS = (
    Kind("transformers.T5EncoderModel", networks.T5_ENCODER, _t5_encoder),
    Kind("neodragon.distil_t5.T5EncoderWithProjection", networks.DISTIL_T5, _distil_t5),
    Kind(
        "neodragon.context_adapter.ContextAdapter",
        networks.CONTEXT_ADAPTER,
        _one_output(networks.CONTEXT_ADAPTER, "x", "y"),
    ),
    Kind(
        "context_embedder of pyramid_dit.mmdit_modules.PyramidDiffusionMMDiT",
        networks.CONTEXT_EMBEDDER,
        _one_output(networks.CONTEXT_EMBEDDER, "encoder_hidden_states", "context"),
    ),
    Kind("transformers.CLIPTextModelWithProjection", networks.CLIP_TEXT, _clip_text),
    *golden_pyramid.KINDS,
    *golden_mmdit.KINDS,
    *golden_vae.KINDS,
    *golden_rollout.KINDS,
    *golden_first_frame.KINDS,
)


def run_case(path: Path) -> Result:
    """Runs the case NAME.json; everything that keeps it from running is the result's `reason`."""
    try:
        return _run(path)
    except (UserError, KeyError, TypeError, ValueError) as error:
        return Result(path.stem, reason=f"{type(error).__name__}: {error}")


def _run(path: Path) -> Result:
    case = read_json(path)
    official = case["official"].partition("(")[0].strip()
    kind = next((kind for kind in KINDS if kind.official == official), None)
    if kind is None:
        return Result(path.stem, reason=f"unknown kind {case['official']!r}")
    numbers = kind.numbers(case)
    with contextlib.closing(SafetensorsFile(path.with_suffix(".safetensors"))) as file:
        expected = {**tensors(file, "out."), **numbers}
        if not expected:
            return Result(path.stem, reason="it has no outputs to compare with")
        got = kind.run(case, file)
    unknown = sorted(set(expected) - set(got))
    if unknown:
        return Result(path.stem, unknown[0], reason=f"outputs that are not computed: {', '.join(unknown)}")
    # The JSON gives no tolerance for masks: they are right or wrong.
    masks = [name for name, array in expected.items() if array.dtype == bool]
    tolerances = case["checks"]["recommended_tolerance_per_output"] | dict.fromkeys(masks, 0.0)
    tolerances |= dict.fromkeys(numbers, JSON_TOLERANCE)
    return max(
        (Result(path.stem, name, relative_error(got[name], expected[name]), tolerances[name]) for name in expected),
        key=lambda result: result.share,
    )


def relative_error(got: jax.Array, expected: np.ndarray) -> float:
    """max |got - expected| / max |expected| in float64; infinite where the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    difference = np.abs(np.asarray(got, np.float64) - expected.astype(np.float64)).max(initial=0.0)
    # Equal is equal, where all of the expected numbers are 0 too.
    return float(difference / np.abs(expected).max()) if difference else 0.0


def run_folder(folder: Path) -> list[Result]:
    """Every case of a folder, by name; a safetensors file without its JSON is a failed case."""
    names = {path.stem for pattern in ("*.json", "*.safetensors") for path in folder.glob(pattern)}
    return [run_case(folder / f"{name}.json") for name in sorted(names)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Run every golden case of a folder.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="pairs NAME.safetensors and NAME.json")
    folder = parser.parse_args(argv).folder
    # Matrix products of lower precision, the default of some accelerators, miss the tolerances.
    with jax.default_matmul_precision("highest"):
        results = run_folder(folder)
    for result in results:
        print(result.line())
    failed = sum(not result.ok for result in results)
    print(f"{len(results)} cases in {folder}, {failed} failed")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
