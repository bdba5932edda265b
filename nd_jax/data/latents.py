"""Cached latents: ArrayRecord shards of the video VAE's posteriors, and what the trainers make of them.

    z      = mean + std * noise                                                                      (1)
    latent = (z - shift) * scale,  one pair for the first latent frame, one for the others           (2)

Equations 2 and 3 of `nd_jax.models.video_vae`. A shard holds mean and std as the encoder put them out, neither sampled
nor normalised: every epoch draws its own sample, and a VAE whose normalisation is measured later needs no second pass.

A folder of latents holds

    latents.json                             the manifest: shapes, VAE, statistics, shards, inputs that were left out
    latents-00000-of-00010.array_record      records: uint32 n (little-endian), n bytes of JSON {"id", "caption",
                                             "shape"}, then mean and std as little-endian float16 of that shape

A float16 keeps 11 bits, an error of at most 1/2048 of a value. A std cannot overflow: the encoder's log variance ends
at 20, which is a std of 22026, and a mean that does is refused. `nd_jax.data.latent_shards` writes the folder.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError, first_line
from nd_jax.weights.sources import is_plain_name, read_json

MANIFEST = "latents.json"
FORMAT = "nd_jax latents"
VERSION = 1
STORED = np.dtype("<f2")

Pair = tuple[float, float]
Tokens = Callable[[str], Mapping[str, np.ndarray]]


# --- records ----------------------------------------------------------------------------------------------------------


def encode_record(mean: np.ndarray, std: np.ndarray, caption: str, id: str) -> bytes:
    """One record; `mean` and `std` float [T, h, w, C].

    Raises:
      UserError: values that are not finite or do not fit float16.
    """
    with np.errstate(over="ignore"):
        stored = [np.ascontiguousarray(values, dtype=STORED) for values in (mean, std)]
    if not all(np.isfinite(values).all() for values in stored):
        worst = float(np.abs(mean).max())
        raise UserError(
            f"{id}: its latents are no numbers or exceed float16 (largest {worst:g}); the video VAE is not a sound one"
        )
    header = json.dumps({"id": id, "caption": caption, "shape": list(mean.shape)}).encode("utf-8")
    return b"".join([len(header).to_bytes(4, "little"), header, *(values.tobytes() for values in stored)])


def decode_record(raw: bytes, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """{"mean": float32 [T, h, w, C], "std": float32 [T, h, w, C], "caption": str, "id": str}.

    Raises:
      ValueError: not a record, or one of another shape.
    """
    start = 4 + int.from_bytes(raw[:4], "little")
    try:
        header = json.loads(raw[4:start].decode("utf-8"))
        caption, id, shape = header["caption"], header["id"], tuple(header["shape"])
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError("is no record of latents") from error
    if not isinstance(caption, str) or not isinstance(id, str):
        raise ValueError("has a caption or an id that is not text")
    if shape != tuple(latent_shape):
        raise ValueError(f"has the shape {shape} where the manifest has {tuple(latent_shape)}")
    count = math.prod(latent_shape)
    if len(raw) != start + 2 * count * STORED.itemsize:
        raise ValueError("is cut short")
    values = np.frombuffer(raw, STORED, 2 * count, start).astype(np.float32).reshape(2, *latent_shape)
    return {"mean": values[0], "std": values[1], "caption": caption, "id": id}


# --- manifest ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean and standard deviation of some values."""

    count: int
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records: its name, their number, its size in bytes, and the SHA-256 of its records in order."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `latents.json` says.

    Attributes:
      latent_shape: [T, h, w, C] of every record.
      video_frames, height, width, frame_rate: of the clips that were encoded; pixels and frames per second.
      encoder_sha256: `latent_shards.encoder_hash` of the VAE.
      latent_shift, latent_scale: of that VAE, equation 2.
      first, later: moments of z in equation 1 over all values of the first latent frame and of the others; `later` is
        None for clips of one frame.
      shards: the files, in order.
      skipped: (id, reason) of the inputs that were left out.
    """

    latent_shape: tuple[int, int, int, int]
    video_frames: int
    height: int
    width: int
    frame_rate: float
    encoder_sha256: str
    latent_shift: Pair
    latent_scale: Pair
    first: Moments
    later: Moments | None
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def num_records(self) -> int:
        return sum(shard.records for shard in self.shards)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        values["skipped"] = [{"id": id, "reason": reason} for id, reason in self.skipped]
        return json.dumps({"format": FORMAT, "version": VERSION, "num_records": self.num_records, **values}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of latents.

    Raises:
      UserError: none, one of another format or version, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: no such file; make the folder, or finish it, with python -m experiments.prepare")
    raw = read_json(path)
    found = (raw.get("format"), raw.get("version"))
    if found != (FORMAT, VERSION):
        raise UserError(f"{path}: is of the format {found}, not {(FORMAT, VERSION)}; prepare the latents again")
    try:
        manifest = _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); run python -m experiments.prepare again") from error
    astray = [shard.file for shard in manifest.shards if not is_plain_name(shard.file)]
    if astray:
        raise UserError(f"{path}: names the shard {astray[0]!r}, which is not a file of its own folder; refused")
    return manifest


def _parse(raw: Mapping[str, Any]) -> Manifest:
    shard = lambda s: Shard(str(s["file"]), int(s["records"]), int(s["bytes"]), str(s["sha256"]))
    moments = lambda m: Moments(int(m["count"]), float(m["mean"]), float(m["std"]))
    pair = lambda name: tuple(float(raw[name][k]) for k in range(2))
    shape = tuple(int(n) for n in raw["latent_shape"])
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"latent_shape {list(shape)} is not [T, h, w, C]")
    return Manifest(
        latent_shape=shape,
        **{name: int(raw[name]) for name in ("video_frames", "height", "width")},
        frame_rate=float(raw["frame_rate"]),
        encoder_sha256=str(raw["encoder_sha256"]),
        latent_shift=pair("latent_shift"),
        latent_scale=pair("latent_scale"),
        first=moments(raw["first"]),
        later=moments(raw["later"]) if raw["later"] is not None else None,
        shards=tuple(shard(s) for s in raw["shards"]),
        skipped=tuple((str(s["id"]), str(s["reason"])) for s in raw["skipped"]),
    )


# --- source -----------------------------------------------------------------------------------------------------------


class LatentSource:
    """The records of a folder of latents; a `Source` of `nd_jax.data.loader`.

    Attributes:
      manifest: of the folder.
      fingerprint: SHA-256 (hex) of the records in order, as the manifest has it; the contents are not read for it.

    Raises:
      UserError: no manifest, or a shard that is absent, cut short or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._readers = [_open_shard(self.folder / shard.file, shard) for shard in self.manifest.shards]
        self._starts = np.cumsum([0] + [shard.records for shard in self.manifest.shards])
        if not len(self):
            raise UserError(f"{self.folder / MANIFEST}: has no records; prepare latents of some readable videos")
        digests = [list(self.manifest.latent_shape), *(shard.sha256 for shard in self.manifest.shards)]
        self.fingerprint = hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"mean": float32 [T, h, w, C], "std": float32 [T, h, w, C], "caption": str, "id": str}.

        Raises:
          IndexError: `index` is not in 0 .. len - 1.
          UserError: the record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = int(index - self._starts[shard])
        try:
            return decode_record(self._readers[shard].read([row])[0], self.manifest.latent_shape)
        except (ValueError, RuntimeError, IndexError) as error:
            path = self.folder / self.manifest.shards[shard].file
            raise UserError(f"{path}: record {row} {first_line(error)}; {_REMEDY}") from error


_REMEDY = "copy the folder again, or delete the shard and its .json and run python -m experiments.prepare again"


def _open_shard(path: Path, shard: Shard) -> Any:
    from array_record.python import array_record_module

    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if size != shard.bytes:
        raise UserError(f"{path}: has {size} bytes where the manifest has {shard.bytes}; {_REMEDY}")
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.num_records()
    except RuntimeError as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); {_REMEDY}") from error
    if records != shard.records:
        raise UserError(f"{path}: holds {records} records where the manifest has {shard.records}; {_REMEDY}")
    return reader


# --- transform --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LatentTransform:
    """Record transform of training on latents: samples and normalises, drops captions at random, tokenises.

    The arrays are `latents` float32 [T, h, w, C] and, for the tokenizers that are given, the columns that
    `nd_jax.models.text_conditioning` reads: `ids` and `mask` of T5, `clip_ids` and `clip_2_ids`, int32 each.

    Attributes:
      latent_shift, latent_scale: of the VAE, equation 2: of the first latent frame and of the others.
      tokenize: T5, text -> {"ids", "mask"}; so are the others.
      clip_tokenize, clip_2_tokenize: of the two CLIPs.
      caption_dropout: probability that every encoder sees the empty caption, all of them together.
    """

    latent_shift: Pair
    latent_scale: Pair
    tokenize: Tokens | None = None
    clip_tokenize: Tokens | None = None
    clip_2_tokenize: Tokens | None = None
    caption_dropout: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise UserError(f"caption_dropout {self.caption_dropout} is not a probability; use a value from 0 to 1")

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        caption = "" if rng.random() < self.caption_dropout else record["caption"]
        noise = rng.standard_normal(record["mean"].shape, np.float32)
        arrays = {"latents": self.normalize(record["mean"] + record["std"] * noise)}
        if self.tokenize is not None:
            tokens = self.tokenize(caption)
            arrays |= {"ids": tokens["ids"], "mask": tokens["mask"]}
        for column, tokenize in (("clip_ids", self.clip_tokenize), ("clip_2_ids", self.clip_2_tokenize)):
            if tokenize is not None:
                arrays[column] = tokenize(caption)["ids"]
        return arrays

    def normalize(self, z: np.ndarray) -> np.ndarray:
        """Equation 2 of a whole clip, float32 [T, h, w, C]."""
        later = np.minimum(np.arange(len(z)), 1)
        shift, scale = (
            np.array(pair, np.float32)[later, None, None, None] for pair in (self.latent_shift, self.latent_scale)
        )
        return (z - shift) * scale
