"""Inputs of the graph `decoder_stream` from use: latents of real videos, and the states that they leave behind.

    python -m converters.calibrate_decoder --model DIR --latents DIR --output DIR --samples 16

runs cached latents (`experiments.prepare`) through the streaming decoder of a model folder and writes one .npz a sample
(`converters.samples`), with arrays `latent` and `state_0..8`, from frames drawn at random; and calibration.json, which
says from where they are. Quantise on some clips and measure on others: --first and --clips.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.decoder_graph import decode_frame, state_names
from converters.graph import component_of
from converters.output_files import write_json
from converters.progress import stages
from converters.samples import Sample
from nd_jax.errors import UserError, run_command
from nd_jax.files import new_folder
from nd_jax.models.taehv import initial_states
from nd_jax.weights.folder import Component, load_component
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE


def capture(vae: Component, clip: np.ndarray, frames: Iterable[int]) -> Iterator[Sample]:
    """What the decoder is given at some frames of a clip.

    Args:
      vae: Neodragon's class.
      clip: de-normalised latents, float32 [T, h, w, C].
      frames: latent frames to keep, of 0 .. T - 1.

    Yields:
      {"latent": float32 [1, h, w, C], "state_0": ..., ...}, in the order of the frames.
    """
    wanted = set(frames)
    states = initial_states(vae.config.decoder, 1, *clip.shape[1:3])
    for frame in range(max(wanted, default=-1) + 1):
        latent = clip[frame][None]
        if frame in wanted:
            yield {"latent": latent, **{name: np.asarray(x) for name, x in zip(state_names(), states, strict=True)}}
        states = decode_frame(vae, latent, states)[1]


def choose_frames(clips: int, frames: int, count: int, seed: int) -> dict[int, list[int]]:
    """Clip -> its frames, `count` in all, from as many clips as possible.

    Raises:
      UserError: there are fewer frames.
    """
    if not 0 < count <= clips * frames:
        raise UserError(
            f"{count} samples of {clips} clips with {frames} latent frames each: give 1 to {clips * frames}"
        )
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((clips, frames)), axis=1)  # of every clip's frames
    chosen: dict[int, list[int]] = {}
    for i, clip in enumerate(np.tile(rng.permutation(clips), -(-count // clips))[:count]):
        chosen.setdefault(int(clip), []).append(int(order[clip, i // clips]))
    return dict(sorted(chosen.items()))


def write_samples(
    model_dir: Path,
    latents: Path,
    output: Path,
    count: int,
    first: int = 0,
    clips: int | None = None,
    seed: int = 0,
    begin: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Writes `count` samples of the latents of clips `first`, `first + 1`, ...

    Args:
      model_dir: its `causal_video_vae` is read.
      latents: folder of `experiments.prepare`.
      output: the folder to make.
      count: samples.
      first: clip.
      clips: how many to draw from; by default all from `first` on.
      seed: of the frames, and of the posterior samples that the latents are.
      begin: called with the name of each stage.

    Returns:
      The report, as in calibration.json.

    Raises:
      UserError: bad model or latents, a range of clips that the folder does not have, `output` is in use.
    """
    from nd_jax.data.latents import LatentSource

    begin("load weights")
    source = LatentSource(latents)
    available = len(source) - first
    clips = available if clips is None else clips
    if first < 0 or not 0 < clips <= available:
        raise UserError(f"{latents}: holds {len(source)} clips; clips {first} to {first + clips - 1} are not there")
    vae = load_component(model_dir / "causal_video_vae", dtype=np.float32)
    component_of({"causal_video_vae": vae}, "causal_video_vae", ASYMMETRIC_VIDEO_VAE)
    if source.manifest.latent_shape[-1] != vae.config.encoder_out_channels:
        raise UserError(
            f"{latents}: {source.manifest.latent_shape[-1]} channels, but the decoder of {model_dir} takes "
            f"{vae.config.encoder_out_channels}; prepare latents with that model"
        )
    chosen, rng, written = choose_frames(clips, source.manifest.latent_shape[0], count, seed), _rng(seed), []
    begin("decode")
    with new_folder(output) as folder:
        for clip, frames in chosen.items():
            record = source[first + clip]
            z = record["mean"] + record["std"] * rng.standard_normal(record["mean"].shape, np.float32)
            for frame, sample in zip(sorted(frames), capture(vae, z, frames), strict=True):
                name = f"clip_{first + clip:05}_frame_{frame:03}.npz"
                np.savez(folder / name, **sample)
                written.append({"file": name, "clip": record["id"], "frame": frame})
        report = {"model": model_dir.name, "latents": source.fingerprint, "seed": seed, "samples": written}
        write_json(folder / "calibration.json", report)
    return report


def _rng(seed: int) -> np.random.Generator:
    """Other numbers than those that draw the frames."""
    return np.random.default_rng((seed, 1))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.calibrate_decoder",
        description="Writes real inputs of the streaming decoder, states included, for converters.quantize.",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder in the released layout")
    parser.add_argument("--latents", type=Path, required=True, help="cached latents, from experiments.prepare")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, one .npz a sample")
    parser.add_argument("--samples", type=int, default=16, help="default 16")
    parser.add_argument("--first", type=int, default=0, metavar="CLIP", help="clip to begin with (default 0)")
    parser.add_argument("--clips", type=int, help="how many clips to draw from (default: all from the first on)")
    parser.add_argument("--seed", type=int, default=0, help="of the frames and of the latents' noise")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with stages(2) as begin:
        report = write_samples(
            args.model, args.latents, args.output, args.samples, args.first, args.clips, args.seed, begin
        )
    clips = len({sample["clip"] for sample in report["samples"]})
    print(f"wrote {len(report['samples'])} samples of {clips} clips: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
