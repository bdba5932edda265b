"""Writing a folder of latents (`nd_jax.data.latents`), shard by shard, so that an interrupted run goes on.

Clip i of the source belongs to shard i div K, K = shard size, whatever the number of processes and runs. Beside the
shards the folder holds

    prepare.json                     what the folder is of; a run of anything else is refused
    latents-00000-of-00010.json      what `Moments`, hash and size its shard has, and the clips that it lacks

A shard is complete when its .json is there, which is written after it; the manifest when all of them are.

The statistics are those of the samples z = mean + std * noise, exactly and without drawing any:

    E[z] = E[mean],   Var[z] = Var[mean] + E[std^2]                                                  (1)

and parts a, b of n values with mean m and M = n Var are joined by (Chan, Golub, LeVeque 1979)

    n = n_a + n_b,  d = m_b - m_a,  m = m_a + d n_b / n,  M = M_a + M_b + d^2 n_a n_b / n            (2)
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.data.latents import MANIFEST, Manifest, Moments, Pair, Shard, decode_record
from nd_jax.errors import UserError, first_line
from nd_jax.files import replacing, write_text
from nd_jax.weights.sources import read_json
from nd_jax.weights.table import flatten

PLAN = "prepare.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder of latents is of.

    Attributes:
      source: fingerprint of the clips.
      num_clips: their number.
      shard_size: clips of a shard.
      latent_shape: [T, h, w, C].
      video_frames, height, width, frame_rate: of a clip.
      encoder_sha256: `encoder_hash` of the VAE.
    """

    source: str
    num_clips: int
    shard_size: int
    latent_shape: tuple[int, int, int, int]
    video_frames: int
    height: int
    width: int
    frame_rate: float
    encoder_sha256: str

    @property
    def num_shards(self) -> int:
        return -(-self.num_clips // self.shard_size)

    def name(self, shard: int) -> str:
        """Of the files of a shard, without their suffix."""
        return f"latents-{shard:05d}-of-{self.num_shards:05d}"

    def clips(self, shard: int) -> range:
        """Indices in the source."""
        return range(shard * self.shard_size, min(self.num_clips, (shard + 1) * self.shard_size))


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A clip that could not be read."""

    id: str
    reason: str


def encoder_hash(config: Any, params: Mapping[str, Any]) -> str:
    """SHA-256 over what decides the posterior: the encoder's sizes and its weights, as they are in memory.

    Two VAEs that share their encoder share their latents, whatever decoder they have and however they normalise; so
    neither is a part of it.
    """
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k.startswith("encoder_")}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for path, leaf in sorted(flatten({k: params[k] for k in ("encoder", "quant_conv")}).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def claim_folder(folder: Path, plan: Plan) -> None:
    """Makes the folder, or checks that it is of the same plan.

    Raises:
      UserError: it is of something else, and what differs.
    """
    path = folder / PLAN
    ours = json.loads(json.dumps(dataclasses.asdict(plan)))
    if path.is_file():
        theirs = read_json(path)
        unlike = [f"{k} is {theirs.get(k)} there and {v} here" for k, v in ours.items() if theirs.get(k) != v]
        if unlike:
            raise UserError(
                f"{folder}: holds latents of other inputs ({'; '.join(unlike)}); choose another --output, or delete it"
            )
        return
    if folder.exists() and not (folder.is_dir() and all(p.name.startswith(f".{PLAN}") for p in folder.iterdir())):
        raise UserError(f"{folder}: exists and is no folder of latents; choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror}); choose another --output") from error
    write_text(path, json.dumps(ours, indent=1) + "\n")


def is_complete(folder: Path, plan: Plan, shard: int) -> bool:
    """Whether a shard needs no work."""
    summary = folder / f"{plan.name(shard)}.json"
    if not summary.is_file():
        return False
    records = folder / f"{plan.name(shard)}.array_record"
    size = records.stat().st_size if records.is_file() else 0
    return size == read_json(summary).get("bytes")


def write_shard(folder: Path, plan: Plan, shard: int, results: Iterable[bytes | Skipped]) -> None:
    """Writes a shard from the records and failures of its clips, in order. A shard without records has no file.

    Raises:
      UserError: the disk is full, or the file cannot be written.
    """
    path = folder / f"{plan.name(shard)}.array_record"
    for leftover in (*folder.glob(f".{plan.name(shard)}.*.tmp"), path):
        leftover.unlink(missing_ok=True)  # Of a run that was killed.
    digest, skipped, count, size = hashlib.sha256(), [], 0, 0
    first, later = Running(), Running()
    results = iter(results)
    result = next(results, None)
    while isinstance(result, Skipped):
        skipped.append(result)
        result = next(results, None)
    if result is not None:
        with replacing(path) as temporary:
            writer = _open_writer(temporary, path)
            while result is not None:
                if isinstance(result, Skipped):
                    skipped.append(result)
                else:
                    _write(writer, result, path)
                    count += 1
                    digest.update(len(result).to_bytes(8, "little") + result)
                    # Of the values that a reader will get, which float16 has rounded.
                    record = decode_record(result, plan.latent_shape)
                    first.add(record["mean"][:1], record["std"][:1])
                    later.add(record["mean"][1:], record["std"][1:])
                result = next(results, None)
            _close(writer, path)
            size = temporary.stat().st_size
    summary = {
        "records": count,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "first": dataclasses.asdict(first),
        "later": dataclasses.asdict(later),
        "skipped": [dataclasses.asdict(clip) for clip in skipped],
    }
    write_text(folder / f"{plan.name(shard)}.json", json.dumps(summary, indent=1) + "\n")


def summarize(
    folder: Path, plan: Plan, latent_shift: Pair, latent_scale: Pair, skipped: Iterable[tuple[str, str]]
) -> Manifest:
    """The manifest of complete shards; `skipped` are inputs that gave no clip.

    Raises:
      UserError: a damaged summary, or no record in any shard.
    """
    first, later, shards, left_out = Running(), Running(), [], list(skipped)
    for shard in range(plan.num_shards):
        path = folder / f"{plan.name(shard)}.json"
        summary = read_json(path)
        try:
            if summary["records"]:
                file = f"{plan.name(shard)}.array_record"
                shards.append(Shard(file, summary["records"], summary["bytes"], summary["sha256"]))
            first.join(Running(**summary["first"]))
            later.join(Running(**summary["later"]))
            left_out += [(clip["id"], clip["reason"]) for clip in summary["skipped"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); delete it and run again") from error
    if not shards:
        reasons = "; ".join(f"{id} {reason}" for id, reason in left_out[:3])
        raise UserError(f"{folder}: none of {plan.num_clips} clips could be read ({reasons}); give other videos")
    sizes = {k: getattr(plan, k) for k in ("video_frames", "height", "width", "frame_rate", "encoder_sha256")}
    return Manifest(
        latent_shape=plan.latent_shape,
        **sizes,
        latent_shift=latent_shift,
        latent_scale=latent_scale,
        first=first.moments(),
        later=later.moments() if later.count else None,
        shards=tuple(shards),
        skipped=tuple(left_out),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `latents.json`, which completes the folder."""
    write_text(folder / MANIFEST, manifest.to_json() + "\n")


@dataclasses.dataclass
class Running:
    """Moments of the values seen so far, equations 1 and 2, in float64.

    Attributes:
      count: n.
      mean: m.
      squares: M.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, mean: np.ndarray, std: np.ndarray) -> None:
        """The values of some posteriors."""
        if mean.size:
            mean, std = mean.astype(np.float64), std.astype(np.float64)
            centre = mean.mean()
            squares = np.square(mean - centre).sum() + np.square(std).sum()
            self.join(Running(mean.size, float(centre), float(squares)))

    def join(self, other: "Running") -> None:
        """Equation 2."""
        total = self.count + other.count
        if other.count:
            difference = other.mean - self.mean
            self.squares += other.squares + difference**2 * self.count * other.count / total
            self.mean += difference * other.count / total
            self.count = total

    def moments(self) -> Moments:
        return Moments(self.count, self.mean, math.sqrt(self.squares / self.count))


# --- ArrayRecord, whose errors are RuntimeErrors ----------------------------------------------------------------------


def _open_writer(temporary: Path, path: Path) -> Any:
    from array_record.python import array_record_module

    try:
        # Groups of one record: the fastest to read in a random order. Latents do not compress.
        return array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    except RuntimeError as error:
        raise _unwritable(path, error) from error


def _write(writer: Any, record: bytes, path: Path) -> None:
    try:
        writer.write(record)
    except RuntimeError as error:
        raise _unwritable(path, error) from error


def _close(writer: Any, path: Path) -> None:
    try:
        writer.close()
    except RuntimeError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: RuntimeError) -> UserError:
    return UserError(f"{path}: cannot be written ({first_line(error)}); free space and run the command again")
