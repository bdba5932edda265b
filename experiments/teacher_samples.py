"""`experiments.prepare --teacher-samples`: latents that a teacher generates from prompts, to train its students on.

    python -m experiments.prepare --teacher-samples --prompts FILE --model DIR --output DIR [--samples K]
        [--steps A,B,C --first-steps A,B,C --guidance A,B --negative-prompt TEXT]
    python -m experiments.prepare --teacher-samples --toy-prompts N --model DIR --output DIR [--seed N]

What is not given comes from generation.json in the model folder, as in experiments.generate; the mode is monolithic.
The folder is one of `nd_jax.data.latents`, which the trainers read as they read encoded videos. Records hold a
posterior, and a sample x of the teacher, which is a normalised latent, is one without any spread:

    mean = x / scale + shift,   std = 0                                                              (1)

so that (mean + std * noise - shift) * scale = x, but for the float16 of the records: |error| <= |mean| scale / 2048.

Record j is sample j mod K of prompt j div K. Its noise comes from the seed and from both numbers alone, sample 0 having
that of experiments.generate. Every shard is made of batches of its own, so its bytes depend on neither earlier runs nor
other processes. Another --batch or number of devices is another program, whose last bits may differ. Beside the files
of `nd_jax.data.latent_shards` the folder holds teacher.json: what the samples depend on.
"""

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.generate import add_sampling_options, open_chosen
from experiments.prepare import TEACHER_SAMPLES, clip_progress, finish
from nd_jax.errors import UserError

SETTINGS = "teacher.json"
ROWS_PER_DEVICE = 8
# Samples whose text lies in memory at once; 2 GB of T5-XXL's at 128 tokens in bfloat16.
TEXT_ROWS = 2048
# Noise ids are uint32: below this bit the prompt's place, above it the number of its sample.
PROMPT_BITS = 24


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.prepare {TEACHER_SAMPLES}",
        description="Latents that a teacher generates from prompts; the same command continues an interrupted run.",
        epilog="What is not given comes from generation.json in the model folder, or is that of the released model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(TEACHER_SAMPLES, action="store_true", help=argparse.SUPPRESS)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help=".txt, one prompt a line, or .jsonl")
    source.add_argument("--toy-prompts", type=int, metavar="N", help="captions of the toy world, drawn with --seed")
    add("--model", required=True, type=Path, metavar="DIR", help="model folder of the teacher, in the released layout")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of latents to make")
    add("--samples", type=int, default=1, metavar="K", help="of every prompt (default 1)")
    add("--seed", type=int, default=0, help="of noise and toy prompts (default 0)")
    add("--batch", type=int, metavar="N", help="samples at once, split over local devices (default up to 8 each)")
    add("--shard-size", type=int, default=64, help="samples of an output file (default 64)")
    add_sampling_options(parser)
    add("--num-processes", type=int, default=1, help="how many processes share the work")
    add("--process-id", type=int, default=0, help="which one this is, from 0")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"{TEACHER_SAMPLES} does not go with {unknown[0]}: give --prompts or --toy-prompts, see --help")
    for name in ("toy_prompts", "samples", "batch", "shard_size", "num_processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    if args.batch is not None and args.batch > args.shard_size:
        parser.error(f"--batch {args.batch} exceeds --shard-size {args.shard_size}: batches are of one shard each")
    if not 0 <= args.process_id < args.num_processes:
        parser.error(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be from 0 to 4294967295")
    return args


def open_prompts(args: argparse.Namespace) -> tuple[Sequence[str], str]:
    """(prompts, fingerprint): equal ones mean equal prompts."""
    from nd_jax.data.prompts import PromptSource
    from nd_jax.data.toy_prompts import toy_prompts
    from nd_jax.distill.folders import text_hash

    if args.prompts is not None:
        source = PromptSource(args.prompts)
        prompts, fingerprint = source, source.fingerprint
    else:
        prompts = toy_prompts(args.toy_prompts, args.seed)
        fingerprint = text_hash(json.dumps(prompts))
    limits = 1 << PROMPT_BITS, 1 << 32 - PROMPT_BITS
    if len(prompts) > limits[0] or args.samples > limits[1]:
        raise UserError(
            f"{len(prompts)} prompts with {args.samples} samples each: at most {limits[0]} prompts and {limits[1]} "
            "samples have noise of their own; split the prompts over several folders, with a --seed for each"
        )
    return prompts, fingerprint


def noise_ids(samples: np.ndarray, per_prompt: int) -> np.ndarray:
    """uint32 ids for `nd_jax.generate.sampler.prompt_keys` of samples in the order of the records."""
    prompt, number = np.divmod(samples, per_prompt)
    return (number << PROMPT_BITS | prompt).astype(np.uint32)


def describe(args: argparse.Namespace, model: Any, fingerprint: str) -> dict[str, Any]:
    """Everything that the samples depend on, as plain data."""
    from nd_jax.weights.folder import component_hash

    sampler, settings = model.sampler(), model.settings
    made_with = {
        "prompts": fingerprint,
        "samples": args.samples,
        "seed": args.seed,
        "dtype": args.dtype,
        "negative_prompt": settings.negative_prompt,
        "text_length": settings.text_length,
        **dataclasses.asdict(sampler),
        "function_evaluations": sampler.function_evaluations,
        "components": {
            folder: component_hash(model.root / folder) for part, folder in model.parts.items() if part != "vae"
        },
    }
    return json.loads(json.dumps(made_with))


def claim(output: Path, plan: Any, made_with: dict[str, Any]) -> None:
    """Makes the output folder, or checks that its samples are of the same settings.

    Raises:
      UserError: it is of something else, and what differs.
    """
    from nd_jax.data import latent_shards
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    path = output / SETTINGS
    if path.is_file():
        before = read_json(path)
        unlike = [name for name in made_with if before.get(name) != made_with[name]]
        if unlike:
            raise UserError(
                f"{output}: its samples were made with {unlike[0]} {before.get(unlike[0])!r}, not "
                f"{made_with[unlike[0]]!r}; choose another --output"
            )
    latent_shards.claim_folder(output, plan)
    if not path.is_file():
        write_text(path, json.dumps(made_with, indent=1) + "\n")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)

    from nd_jax.data import latent_shards
    from nd_jax.distill.folders import text_hash
    from nd_jax.weights.folder import load_component
    from nd_jax.weights.vae import VIDEO_VAE_ENCODER

    model = open_chosen(args, "monolithic")
    video, settings = model.sampler().video, model.settings
    prompts, fingerprint = open_prompts(args)
    # No encoder runs, but whoever puts these latents beside encoded videos must know that they are of one VAE.
    vae = load_component(model.path("vae"), VIDEO_VAE_ENCODER, np.float32)
    made_with = describe(args, model, fingerprint)
    plan = latent_shards.Plan(
        source=text_hash(json.dumps(made_with, sort_keys=True)),
        num_clips=len(prompts) * args.samples,
        shard_size=args.shard_size,
        latent_shape=(video.latent_frames, video.height, video.width, model.transformer.in_channels),
        video_frames=settings.video_frames,
        height=settings.height,
        width=settings.width,
        frame_rate=float(settings.frame_rate),
        encoder_sha256=latent_shards.encoder_hash(vae.config, vae.params),
    )
    del vae
    claim(args.output, plan, made_with)
    begin = time.perf_counter()
    count = sample_missing(args, model, prompts, plan)
    rate = count / (time.perf_counter() - begin)
    done = f"{count} samples at {rate:.3g}/s" if count else "nothing to sample"
    return finish(args.output, plan, model.vae, (), done)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample_missing(args: argparse.Namespace, model: Any, prompts: Sequence[str], plan: Any) -> int:
    """Makes the shards of this process that are missing; returns the number of their samples."""
    import jax

    from nd_jax.data import latent_shards
    from nd_jax.train.sharding import make_mesh

    mine = range(args.process_id, plan.num_shards, args.num_processes)
    missing = [shard for shard in mine if not latent_shards.is_complete(args.output, plan, shard)]
    count = sum(len(plan.clips(shard)) for shard in missing)
    if not missing:
        return 0
    # Of this process alone: processes know nothing of each other.
    devices = jax.local_devices()
    rows = min(plan.shard_size, plan.num_clips) // len(devices)  # More would only be filled up.
    batch = args.batch or len(devices) * min(ROWS_PER_DEVICE, max(1, rows))
    devices = devices[: math.gcd(batch, len(devices))]
    mesh = make_mesh({"data": -1}, devices) if len(devices) > 1 else None
    with clip_progress("sample", count) as advance:
        together = max(1, TEXT_ROWS // plan.shard_size)
        for start in range(0, len(missing), together):
            shards = missing[start : start + together]
            sample_shards(args, model, prompts, plan, shards, batch, mesh, advance)
    return count


def filled_rows(samples: range, batch: int) -> np.ndarray:
    """The samples of a shard in whole batches: the last one is filled up with its last sample."""
    return np.pad(np.asarray(samples), (0, -len(samples) % batch), mode="edge")


def sample_shards(
    args: argparse.Namespace,
    model: Any,
    prompts: Sequence[str],
    plan: Any,
    shards: Sequence[int],
    batch: int,
    mesh: Any,
    advance: Any,
) -> None:
    """Encodes the text of some shards, then samples and writes one after another."""
    import jax
    import jax.numpy as jnp

    from nd_jax.data import latent_shards
    from nd_jax.generate import pipeline

    sampler, dtype = model.sampler(), jnp.dtype(args.dtype)
    rows = np.concatenate([filled_rows(plan.clips(shard), batch) for shard in shards])
    used, places = np.unique(rows // args.samples, return_inverse=True)
    # The last row is the negative prompt's.
    texts = [prompts[int(place)] for place in used] + [model.settings.negative_prompt] * sampler.needs_negative
    text = pipeline.encode_prompts(model, texts, dtype)
    negative = jax.tree.map(lambda x: x[-1:], text) if sampler.needs_negative else None
    stages = len(rows) // batch * len(sampler.sampled_units) * sampler.video.stages
    part = sum(len(plan.clips(shard)) for shard in shards) / stages
    batches = pipeline.sample_latents(
        model,
        jax.tree.map(lambda x: x[places], text),
        noise_ids(rows, args.samples),
        args.seed,
        negative,
        None,
        batch,
        dtype,
        mesh,
        on_stage=lambda end: advance(part),
    )
    for shard in shards:
        samples = plan.clips(shard)
        latents = itertools.chain.from_iterable(itertools.islice(batches, -(-len(samples) // batch)))
        records = sample_records(model, prompts, samples, args.samples, latents)
        latent_shards.write_shard(args.output, plan, shard, records)


def sample_records(
    model: Any, prompts: Sequence[str], samples: range, per_prompt: int, latents: Iterable[np.ndarray]
) -> Iterator[bytes]:
    """Records (equation 1) of samples and their normalised latents [T, h, w, C], of which the filling comes last."""
    from nd_jax.data.latents import STORED, encode_record
    from nd_jax.models.video_vae import denormalize_latents

    for sample, x in zip(samples, latents, strict=False):
        prompt, number = divmod(sample, per_prompt)
        id = f"prompt-{prompt:07d}-{number:03d}"
        mean = np.asarray(denormalize_latents(model.vae, x[None])[0])
        if not np.abs(mean).max() <= np.finfo(STORED).max:  # False for what is no number, too.
            raise UserError(
                f"{id}: the sample of {model.path('transformer')} is no numbers or exceeds float16; try --dtype "
                "float32, or look at the teacher's videos with experiments.generate"
            )
        yield encode_record(mean, np.zeros_like(mean), prompts[prompt], id)
