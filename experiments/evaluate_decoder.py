"""`experiments.evaluate decoder`: a tiny decoder beside the decoder that its latents come with, on clips of either."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.prepare import find_vae
from nd_jax.errors import UserError

RESULT, PICTURE, VIDEO = "decoder.json", "decoder.png", "decoder-{:02d}.mp4"
# Clips in the picture and as videos, and frames of each in the picture.
SHOWN, SHOWN_FRAMES = 6, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--student", required=True, type=Path, metavar="DIR", help="model folder with the tiny decoder")
    add("--native", type=Path, metavar="DIR", help="model folder with the decoder to compare it with")
    add("--output", required=True, type=Path, metavar="DIR", help=f"{RESULT}, {PICTURE} and videos go here")
    add("--toy-world", type=int, metavar="N", help="measure on N clips of the toy world that training never saw")
    add("--seed", type=int, default=1000, help="of the toy world (default 1000)")
    add("--videos", type=Path, metavar="DIR", help="measure on the clips of these videos")
    add("--captions", type=Path, metavar="FILE", help="captions file that selects among the videos")
    add("--lpips", type=Path, metavar="DIR", help="folder of LPIPS weights (converters.import_lpips); else no LPIPS")
    add("--frames", type=int, default=17, metavar="F", help="of a clip, 8k + 1 (default 17)")
    add("--height", type=int, default=64, help="pixels (default 64)")
    add("--width", type=int, default=64, help="pixels (default 64)")
    add("--frame-rate", type=float, default=8.0, help="frames a second (default 8)")
    add("--batch", type=int, default=8, metavar="N", help="clips at once (default 8)")


def evaluate_decoder(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, and writes what `add_arguments` says; returns what `decoder.json` holds."""
    import jax

    from nd_jax.files import write_text
    from nd_jax.generate.videos import to_uint8, write_video

    clips = _clips(args)
    networks = {"student": _decoder(args.student)}
    if args.native is not None:
        networks["native"] = _decoder(args.native)
    encoder = _encoder(args.student)
    measure = jax.jit(_measures(args.lpips))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be created ({error.strerror}); choose another --output") from error

    values: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in networks}
    shown: list[dict[str, np.ndarray]] = []
    for video, real in _batches(clips, args.batch):
        latents = encoder(video)
        decoded = {name: np.clip(np.asarray(network.decode(latents)), -1, 1) for name, network in networks.items()}
        for name, frames in decoded.items():
            values[name].append({k: np.asarray(v)[:real] for k, v in measure(frames, video).items()})
        for row in range(min(real, SHOWN - len(shown))):
            shown.append({"input": video[row]} | {name: frames[row] for name, frames in reversed(decoded.items())})

    result: dict[str, Any] = {"clips": len(clips), "student": str(args.student)}
    for name, network in networks.items():
        means = {
            k: np.concatenate([batch[k] for batch in values[name]]) for k in (values[name][0] if values[name] else ())
        }
        result[name] = {
            "parameters": network.parameters,
            **{k: {"mean": float(v.mean()), "std": float(v.std())} for k, v in means.items()},
        }
    result["shown"] = list(shown[0])
    for k, clip in enumerate(shown):
        frames = np.concatenate([to_uint8(frames) for frames in clip.values()], axis=2)
        write_video(args.output / VIDEO.format(k), frames, args.frame_rate)
    _write_picture(args.output / PICTURE, [[to_uint8(frames) for frames in clip.values()] for clip in shown])
    write_text(args.output / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def describe(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    names = [name for name in ("student", "native") if name in result]
    shown = "; ".join(f"{n} {result[n]['psnr_db']['mean']:.2f} dB, SSIM {result[n]['ssim']['mean']:.3f}" for n in names)
    return f"{result['clips']} clips: {shown}: {args.output / RESULT}"


class _Decoder:
    """Latents [B, T, h, w, C] -> video, and how many parameters do it."""

    def __init__(self, decode: Callable, parameters: int):
        self.decode, self.parameters = decode, parameters


def _load(folder: Path) -> tuple[Any, dict]:
    """(module of either class, parameters)."""
    from nd_jax.distill.folders import folder_config
    from nd_jax.weights.folder import load_component
    from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE

    folder = find_vae(folder)
    network, _ = folder_config(folder, ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE)
    component = load_component(folder, network, np.float32)
    return network.module(component.config), component.params


def _decoder(folder: Path) -> _Decoder:
    import jax

    vae, params = _load(folder)
    params = {name: params[name] for name in ("decoder", "post_quant_conv")}
    decode = jax.jit(lambda latents: vae.apply({"params": params}, latents, method="decode"))
    return _Decoder(decode, sum(x.size for x in jax.tree.leaves(params)))


def _encoder(folder: Path) -> Callable:
    """Video -> mean of its posterior."""
    import jax

    vae, params = _load(folder)
    params = {name: params[name] for name in ("encoder", "quant_conv")}
    return jax.jit(lambda video: vae.apply({"params": params}, video, method="encode").mean)


def _measures(lpips: Path | None) -> Callable:
    from nd_jax.distill.decoder import VIDEO_RANGE, lpips_of_clips
    from nd_jax.distill.perceptual import measure_clips
    from nd_jax.weights.lpips import load_lpips

    if lpips is None:
        return lambda y, x: measure_clips(y, x, VIDEO_RANGE)
    config, params = load_lpips(lpips)
    return lambda y, x: measure_clips(y, x, VIDEO_RANGE) | {"lpips": lpips_of_clips(params, y, x, config, np.float32)}


def _clips(args: argparse.Namespace) -> Any:
    from nd_jax.data.toy_world import CLIP_FRAMES, ToyWorld
    from nd_jax.data.videos import VideoFolder

    if (args.toy_world is None) == (args.videos is None) or (args.videos is None) != (args.captions is None):
        raise UserError("give --videos with --captions, or --toy-world")
    sizes = (args.frames, args.height, args.width)
    if args.toy_world is not None:
        return ToyWorld(args.toy_world, args.seed, *sizes, max(args.frames, CLIP_FRAMES))
    return VideoFolder(args.videos, args.captions, *sizes, args.frame_rate)


def _batches(clips: Any, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """(full batches float32 [batch, F, H, W, 3] in [-1, 1], how many of their rows are clips)."""
    if batch < 1:
        raise UserError(f"--batch is {batch}: use 1 or more")
    for start in range(0, len(clips), batch):
        rows = [clips[k]["video"] for k in range(start, min(start + batch, len(clips)))]
        video = np.stack(rows + rows[-1:] * (batch - len(rows)))
        yield video.astype(np.float32) / np.float32(127.5) - np.float32(1), len(rows)


def _write_picture(path: Path, clips: Sequence[Sequence[np.ndarray]]) -> None:
    """One row per clip: evenly spaced frames of the input, then of every decoder."""
    from PIL import Image

    from nd_jax.files import replacing

    frames = np.linspace(0, len(clips[0][0]) - 1, SHOWN_FRAMES).round().astype(int)
    strip = lambda video: np.concatenate(list(video[frames]), axis=1)
    picture = np.concatenate([np.concatenate([strip(video) for video in clip], axis=1) for clip in clips])
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
