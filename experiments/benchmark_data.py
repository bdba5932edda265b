"""Benchmark cases of the data pipeline, side by side with PyTorch's DataLoader.

Both sides read the same records, call the same transform and make batches of the same rows in a random order, ahead of
whoever takes them, with as many workers as there are processors. Ours are threads, which share the source and hand over
arrays; the DataLoader's are processes, which open the source once each and send batches through shared memory. What is
compared is the machinery around the records. Work outside of Python's lock (tokenizers, decoders) suits threads.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from converters.packages import need
from experiments.benchmark_case import Case
from nd_jax.data import latent_shards
from nd_jax.data.latents import LatentSource, LatentTransform, encode_record
from nd_jax.data.loader import Batches, LoaderOptions
from nd_jax.data.prompts import PromptSource, PromptTransform
from nd_jax.data.tokenizers import Tokenize, build_unigram_tokenizer, load_tokenizer
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.data.videos import ClipTransform, VideoFolder

# Makes (source, transform); called once in our process, and once in each worker of the other side.
Open = Callable[[], tuple[Any, Callable]]

TEXT_TOKENS = 128
LATENT_SHAPE = (7, 40, 64, 16)
# Batches that a worker makes ahead, on both sides. They fill up while the other side runs, which costs a run nothing: a
# run takes ten times as many.
AHEAD = 2


# --- the two loaders --------------------------------------------------------------------------------------------------


class TorchRecords:
    """Map-style dataset of PyTorch; it opens its source where it is read."""

    def __init__(self, open_records: Open, length: int):
        self._open, self._length, self._records = open_records, length, None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if self._records is None:
            self._records = self._open()
        source, transform = self._records
        return {**transform(source[index], np.random.default_rng(index)), "example": np.int64(index)}


def loader_calls(
    open_records: Open, batch: int, batches: int, workers: int
) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """(ours, the DataLoader's): each takes the next `batches` batches and returns the last one.

    Args:
      open_records: picklable.
      batch: rows.
      batches: taken by a run.
      workers: threads of ours, processes of the other side; 0 reads in the calling thread.
    """
    need("torch")
    from torch.utils.data import DataLoader

    source, transform = open_records()
    iterator = Batches(
        source, transform, LoaderOptions(batch, num_threads=workers, prefetch_batches=AHEAD * max(workers, 1))
    )
    ahead = (
        {"prefetch_factor": AHEAD, "persistent_workers": True, "multiprocessing_context": "spawn"} if workers else {}
    )
    records = TorchRecords(open_records, len(source))
    loader = DataLoader(records, batch, shuffle=True, drop_last=True, num_workers=workers, **ahead)

    def endless() -> Iterator[dict]:
        while True:
            yield from loader

    def take(stream: Iterator[dict]) -> dict:
        for _ in range(batches - 1):
            next(stream)
        return next(stream)

    theirs = endless()
    return lambda: take(iterator), lambda: take(theirs)


# --- what they read ---------------------------------------------------------------------------------------------------


def write_prompts(folder: Path, count: int) -> Open:
    """A JSONL file of captions and a tokenizer."""
    prompts = toy_prompts(count)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    build_unigram_tokenizer(prompts[:2000], 512, folder / "tokenizer")
    return functools.partial(open_prompts, folder)


def open_prompts(folder: Path) -> tuple[PromptSource, PromptTransform]:
    tokenize = Tokenize(load_tokenizer(folder / "tokenizer"), TEXT_TOKENS)
    return PromptSource(folder / "prompts.txt"), PromptTransform(tokenize)


def write_latents(folder: Path, count: int, shape: tuple[int, int, int, int] = LATENT_SHAPE) -> Open:
    """Cached latents of random numbers."""
    plan = latent_shards.Plan("random", count, count, shape, 8 * shape[0] - 7, 8 * shape[1], 8 * shape[2], 24.0, "none")
    rng, folder = np.random.default_rng(0), folder / "latents"
    values = [rng.random(shape, np.float32) for _ in range(2)]
    latent_shards.claim_folder(folder, plan)
    records = (encode_record(*values, f"caption {k}", f"clip {k}") for k in range(count))
    latent_shards.write_shard(folder, plan, 0, records)
    unchanged = (0.0, 0.0), (1.0, 1.0)
    latent_shards.write_manifest(folder, latent_shards.summarize(folder, plan, *unchanged, []))
    return functools.partial(open_latents, folder)


def open_latents(folder: Path) -> tuple[LatentSource, LatentTransform]:
    source = LatentSource(folder)
    return source, LatentTransform(source.manifest.latent_shift, source.manifest.latent_scale)


class DecodedClips:
    """Clips that are decoded at every reading; `VideoFolder` itself keeps the first ones."""

    def __init__(self, videos: VideoFolder):
        self._videos, self.fingerprint = videos, videos.fingerprint

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._videos.read(index)


def write_clips(folder: Path, count: int, frames: int = 49, height: int = 320, width: int = 512) -> Open:
    """H.264 videos of moving noise, one clip each."""
    need("av")
    import av

    rng, folder = np.random.default_rng(0), folder / "videos"
    folder.mkdir()
    coarse = rng.integers(0, 255, (height // 16, width // 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    for number in range(count):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(24))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for k in range(frames):
                picture = np.roll(coarse, (2 * k + number, 3 * k), axis=(0, 1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    captions = "".join(f'{{"video": "{k}.mp4", "caption": "moving noise"}}\n' for k in range(count))
    (folder / "captions.jsonl").write_text(captions)
    return functools.partial(open_clips, folder, frames, height, width)


def open_clips(folder: Path, frames: int, height: int, width: int) -> tuple[DecodedClips, ClipTransform]:
    return DecodedClips(VideoFolder(folder, folder / "captions.jsonl", frames, height, width, 24.0)), ClipTransform()


# --- cases ------------------------------------------------------------------------------------------------------------


def data_cases(workers: int) -> Iterator[Case]:
    """Prompts, cached latents and clips that are decoded, of the released sizes."""
    kinds = (
        ("prompts", f"tokenised to {TEXT_TOKENS}", write_prompts, 20_000, 256),
        ("latents", "cached, 7 x 40 x 64 x 16", write_latents, 64, 8),
        ("clips", "H.264, 49 x 320 x 512", write_clips, 8, 2),
    )
    batches = 10 * AHEAD * max(workers, 1)
    for unit, what, write, records, batch in kinds:

        def build(write=write, records=records, batch=batch):
            folder = tempfile.TemporaryDirectory()
            ours, theirs = loader_calls(write(Path(folder.name), records), batch, batches, workers)
            # The folder lives as long as what reads it.
            return lambda: (ours(), folder)[0], theirs

        sizes = {"records": records, "batch": batch, "batches": batches, "workers": workers}
        yield Case(f"{unit}, {what}", sizes, build, "DataLoader", amount=batch * batches, unit=unit)
