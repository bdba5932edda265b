"""Encodes captioned videos with the video VAE of a model folder: latents to train on.

    python -m experiments.prepare --videos DIR --captions FILE --model DIR --output DIR \
        [--frames 49 --height 320 --width 512 --frame-rate 24 --clips-per-video N]
    python -m experiments.prepare --toy-world COUNT --model DIR --output DIR [--seed N]
    python -m experiments.prepare --teacher-samples --prompts FILE --model DIR --output DIR   (teacher_samples.py)

The same command continues a run that was interrupted. Several processes share the work: start the command once in
each, with --num-processes and --process-id and one --output; the last to finish writes latents.json.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError, run_command

VIDEO_SIZE = {"frames": 49, "height": 320, "width": 512}
TOY_SIZE = {"frames": 17, "height": 64, "width": 64}
# Pixels of one call of the encoder on a device. It needs 5 KB for each at full size: 7.3 GB for 9 frames of 320x512.
CALL_PIXELS = 1 << 21
MAX_BATCH = 8
COMPONENT = "causal_video_vae"
TEACHER_SAMPLES = "--teacher-samples"


@dataclasses.dataclass(frozen=True)
class Clips:
    """What is to be encoded.

    Attributes:
      read: index -> {"video", "caption", "id"}; raises UnreadableVideo.
      ids: of all clips.
      fingerprint: equal ones mean equal clips.
      skipped: (name, reason) of inputs that gave no clip.
    """

    read: Callable[[int], dict[str, Any]]
    ids: Sequence[str]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare",
        description="Encode captioned videos into latents to train on; the same command continues an interrupted run.",
        allow_abbrev=False,
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder of videos, in any format that FFmpeg reads")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help=".jsonl or .csv with video and caption, or .txt: name, tab, caption",
    )
    parser.add_argument("--toy-world", type=int, metavar="COUNT", help="drawn clips in place of videos and captions")
    parser.add_argument(
        TEACHER_SAMPLES,
        action="store_true",
        help=f"no videos at all: what the model itself generates from prompts; see {TEACHER_SAMPLES} --help",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the toy world (default 0)")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help=f"model folder with {COMPONENT}, or that folder itself"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of latents to make")
    parser.add_argument("--frames", type=int, help="video frames of a clip, 8k + 1 (default 49; toy world 17)")
    parser.add_argument("--height", type=int, help="of a clip in pixels (default 320; toy world 64)")
    parser.add_argument("--width", type=int, help="likewise (default 512; toy world 64)")
    parser.add_argument("--frame-rate", type=float, default=24.0, help="frames per second of a clip (default 24)")
    parser.add_argument(
        "--clips-per-video", type=int, metavar="N", help="spread evenly (default: as many as fit one after another)"
    )
    parser.add_argument(
        "--batch", type=int, help="clips that are encoded together (default: what memory suits, up to 8 a device)"
    )
    parser.add_argument(
        "--chunk", type=int, help="latent frames in one call of the encoder (default: what memory suits)"
    )
    parser.add_argument("--shard-size", type=int, default=64, help="clips of an output file (default 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads that read videos ahead")
    parser.add_argument(
        "--update-normalization",
        action="store_true",
        help="write latent_shift and latent_scale into the VAE's config.json, from the statistics of these latents",
    )
    parser.add_argument("--num-processes", type=int, default=1, help="how many processes share the work")
    parser.add_argument("--process-id", type=int, default=0, help="which one this is, from 0")
    args = parser.parse_args(argv)
    if (args.toy_world is None) == (args.videos is None) or (args.videos is None) != (args.captions is None):
        parser.error(f"give --videos with --captions, or --toy-world, or {TEACHER_SAMPLES} with --prompts")
    for name, size in (VIDEO_SIZE if args.toy_world is None else TOY_SIZE).items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    for name in ("batch", "chunk", "shard_size", "threads", "num_processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    if not 0 <= args.process_id < args.num_processes:
        parser.error(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")
    return args


def open_clips(args: argparse.Namespace) -> Clips:
    """The clips that the arguments name."""
    if args.toy_world is None:
        from nd_jax.data.videos import VideoFolder

        sizes = (args.frames, args.height, args.width, args.frame_rate)
        folder = VideoFolder(args.videos, args.captions, *sizes, args.clips_per_video)
        return Clips(folder.read, [clip.id for clip in folder.clips], folder.fingerprint, folder.skipped)
    from nd_jax.data.toy_world import CLIP_FRAMES, ToyWorld

    sizes = (args.frames, args.height, args.width, max(args.frames, CLIP_FRAMES))
    world = ToyWorld(args.toy_world, args.seed, *sizes)
    return Clips(world.__getitem__, world.ids, world.fingerprint)


def find_vae(model: Path) -> Path:
    """The component folder of the video VAE."""
    for folder in (model, model / COMPONENT):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{model}: holds neither {COMPONENT}/config.json nor config.json; give a model folder")


def build_encoder(config: Any, params: dict, batch: int, chunk: int) -> Callable[[np.ndarray], tuple]:
    """Function of uint8 videos [b, F, H, W, 3], b <= batch, to (mean, std), each float32 [b, T, h, w, C].

    The batch is padded to its full size, so that nothing compiles twice, and spread over the devices of this process.
    """
    import jax
    import jax.numpy as jnp

    from nd_jax.models.video_chunks import encode_chunked
    from nd_jax.models.video_vae import VideoVAEEncoder

    devices = jax.local_devices()[: math.gcd(batch, jax.local_device_count())]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    vae = VideoVAEEncoder(config)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    to_float = jax.jit(lambda video: video.astype(jnp.float32) / 127.5 - 1.0)

    def encode(videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((batch, *videos.shape[1:]), np.uint8)
        padded[: len(videos)] = videos
        posterior = encode_chunked(vae, params, to_float(jax.device_put(padded, spread)), chunk)
        mean, logvar = (np.asarray(part)[: len(videos)] for part in posterior)
        return mean, np.exp(0.5 * logvar)

    return encode


def read_ahead(read: Callable[[int], Any], indices: Iterable[int], threads: int, ahead: int) -> Iterator[Any]:
    """`read` of every index in order, at most `ahead` of them before their turn."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque = deque()
        try:
            for index in indices:
                pending.append(pool.submit(read, index))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def encode_results(results: Iterable[Any], encode: Callable, batch: int, on_clip: Callable[[], None]) -> Iterator[Any]:
    """Records of the clips and the failures among `results`; batches are filled with what could be read."""
    from nd_jax.data.latent_shards import Skipped
    from nd_jax.data.latents import encode_record

    def flush(clips: list) -> Iterator[bytes]:
        if clips:
            means, stds = encode(np.stack([clip["video"] for clip in clips]))
            for clip, mean, std in zip(clips, means, stds, strict=True):
                yield encode_record(mean, std, clip["caption"], clip["id"])
                on_clip()

    clips: list[dict[str, Any]] = []
    for result in results:
        if isinstance(result, Skipped):
            yield result
            on_clip()
            continue
        clips.append(result)
        if len(clips) == batch:
            yield from flush(clips)
            clips = []
    yield from flush(clips)


def update_normalization(vae: Path, manifest: Any) -> Any:
    """Writes shift = mean and scale = 1 / std of the latents into the VAE's config.json; the manifest with them.

    Latents of one frame tell nothing of later ones, whose pair stays.
    """
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    shift, scale = list(manifest.latent_shift), list(manifest.latent_scale)
    for k, moments in enumerate((manifest.first, manifest.later)):
        if moments is None:
            continue
        if not moments.std > 0:
            raise UserError(f"{vae}: all its latents are {moments.mean:g}; train the VAE before it is normalised")
        shift[k], scale[k] = moments.mean, 1 / moments.std
    config = {**read_json(vae / "config.json"), "latent_shift": shift, "latent_scale": scale}
    write_text(vae / "config.json", json.dumps(config, indent=2) + "\n")
    return dataclasses.replace(manifest, latent_shift=tuple(shift), latent_scale=tuple(scale))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    if TEACHER_SAMPLES in argv:
        from experiments import teacher_samples

        return teacher_samples.main(argv)
    args = parse(argv)
    clips = open_clips(args)
    for name, reason in clips.skipped:
        print(f"left out {name}: {reason}", file=sys.stderr)

    from nd_jax.data import latent_shards
    from nd_jax.models.video_vae import latent_frames, latent_size
    from nd_jax.weights.folder import load_component
    from nd_jax.weights.vae import VIDEO_VAE_ENCODER

    vae = find_vae(args.model)
    component = load_component(vae, VIDEO_VAE_ENCODER, np.float32)
    config = component.config
    if args.height % config.space_factor or args.width % config.space_factor:
        raise UserError(f"{args.height}x{args.width} pixels do not fit the VAE: use multiples of {config.space_factor}")
    size = latent_size(config, args.height, args.width)
    plan = latent_shards.Plan(
        source=clips.fingerprint,
        num_clips=len(clips.ids),
        shard_size=args.shard_size,
        latent_shape=(latent_frames(config, args.frames), *size, config.encoder_out_channels),
        video_frames=args.frames,
        height=args.height,
        width=args.width,
        frame_rate=args.frame_rate,
        encoder_sha256=latent_shards.encoder_hash(config, component.params),
    )
    latent_shards.claim_folder(args.output, plan)
    begin = time.perf_counter()
    count = encode_missing(args, clips, plan, component)
    rate = count / (time.perf_counter() - begin)
    done = f"{count} clips at {rate:.3g}/s" if count else "nothing to encode"
    return finish(args.output, plan, config, clips.skipped, done, vae if args.update_normalization else None)


def encode_missing(args: argparse.Namespace, clips: Clips, plan: Any, component: Any) -> int:
    """Makes the shards of this process that are missing; returns the number of their clips."""
    import jax

    from nd_jax.data import latent_shards
    from nd_jax.data.video_reader import UnreadableVideo

    mine = range(args.process_id, plan.num_shards, args.num_processes)
    missing = [shard for shard in mine if not latent_shards.is_complete(args.output, plan, shard)]
    todo = [index for shard in missing for index in plan.clips(shard)]
    if not todo:
        return 0

    def read(index: int) -> Any:
        try:
            return clips.read(index)
        except UnreadableVideo as error:
            print(f"left out {clips.ids[index]}: {error}", file=sys.stderr)
            return latent_shards.Skipped(clips.ids[index], str(error))

    devices = jax.local_device_count()
    pixels = plan.height * plan.width * component.config.time_factor  # Of a latent frame.
    batch = args.batch or devices * min(MAX_BATCH, max(1, CALL_PIXELS // pixels))
    rows = batch // math.gcd(batch, devices)  # Of a device.
    chunk = args.chunk or min(plan.latent_shape[0], max(1, CALL_PIXELS // (rows * pixels)))
    encode = build_encoder(component.config, component.params, batch, chunk)
    results = read_ahead(read, todo, args.threads, batch + args.threads)
    with clip_progress("encode", len(todo)) as on_clip:
        for shard in missing:
            part = islice(results, len(plan.clips(shard)))
            encoded = encode_results(part, encode, batch, on_clip)
            latent_shards.write_shard(args.output, plan, shard, encoded)
    return len(todo)


def finish(
    output: Path, plan: Any, config: Any, skipped: Sequence[tuple[str, str]], done: str, update: Path | None = None
) -> int:
    """Writes the manifest when no shard is missing; says what was done. `update`: the VAE to normalise."""
    from nd_jax.data import latent_shards
    from nd_jax.data.latents import MANIFEST

    missing = [s for s in range(plan.num_shards) if not latent_shards.is_complete(output, plan, s)]
    if missing:
        print(f"{done}; {len(missing)} of {plan.num_shards} shards are left to other processes: {output}")
        return 0
    manifest = latent_shards.summarize(output, plan, config.latent_shift, config.latent_scale, skipped)
    if update:
        manifest = update_normalization(update, manifest)
        print(f"normalisation {manifest.latent_shift}, {manifest.latent_scale}: {update / 'config.json'}")
    latent_shards.write_manifest(output, manifest)
    left_out = f", {len(manifest.skipped)} inputs left out" if manifest.skipped else ""
    print(f"{done}; {manifest.num_records} records in {len(manifest.shards)} shards{left_out}: {output / MANIFEST}")
    return 0


@contextlib.contextmanager
def clip_progress(name: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on a terminal; yields a function to call after every clip, or with the part of one that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done=1: bar.advance(task, done)


if __name__ == "__main__":
    sys.exit(run_command(main))
