"""Cached latents together with the frames that they encode, for training decoders.

The latents are a folder of `experiments.prepare`; the frames are drawn or decoded again from the clips that it was made
of, which takes a hundredth of their space. The two belong together by the ids of the clips.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nd_jax.data.latents import LatentSource
from nd_jax.errors import UserError


class Clips(Protocol):
    """Clips with names; a record is {"video": uint8 [F, H, W, 3], "id": str, ...}."""

    @property
    def ids(self) -> Sequence[str]: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class LatentClips:
    """Records of latents with their frames; a `Source` of `nd_jax.data.loader`.

    Args:
      latents: the folder. Its records are in the order of the clips, without those that its manifest left out.
      clips: what it was made of.

    Raises:
      UserError: the folder was made of other clips, or of clips of another size.
    """

    def __init__(self, latents: LatentSource, clips: Clips):
        self._latents, self._clips = latents, clips
        self.fingerprint = latents.fingerprint
        skipped = {id for id, _ in latents.manifest.skipped}
        self._places = [place for place, id in enumerate(clips.ids) if id not in skipped]
        self._record = {clips.ids[place]: k for k, place in enumerate(self._places)}
        first = latents[0]["id"]
        if len(self._places) != len(latents) or self._record.get(first) != 0:
            raise UserError(
                f"{latents.folder}: has {len(latents)} records, of which {first} is the first, and {len(self._places)} "
                "other clips are given: give the videos, captions, sizes and seed that it was prepared with"
            )
        manifest, found = latents.manifest, clips[self._places[0]]["video"].shape[:3]
        wanted = (manifest.video_frames, manifest.height, manifest.width)
        if found != wanted:
            raise UserError(
                f"{latents.folder}: encodes clips of {'x'.join(map(str, wanted))} (frames x height x width), and the "
                f"clips that are given have {'x'.join(map(str, found))}: give the same sizes"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"video": uint8 [F, H, W, 3], "mean", "std": float32 [T, h, w, C], "caption", "id": str}.

        Raises:
          UserError: a damaged record, or the latents of another clip.
        """
        # A folder of videos puts another clip in the place of one that does not decode any more.
        clip = self._clips[self._places[index]]
        record = self._latents[self._record.get(clip["id"], index)]
        if record["id"] != clip["id"]:
            raise UserError(
                f"{self._latents.folder}: holds the latents of {record['id']} where {clip['id']} should be: "
                "give the clips that it was prepared with"
            )
        return {**record, "video": clip["video"]}


@dataclasses.dataclass(frozen=True)
class LatentClipTransform:
    """{"video": float32 [F, H, W, 3] in [-1, 1], "mean", "std": float32 [T, h, w, C]} of a cut-out.

    In time it is the beginning of the clip: a decoder that starts in the middle lacks what it would remember there.

    Attributes:
      video_frames: 8k + 1; all by default.
      height, width: pixels of a random cut-out that begins at a latent pixel; the whole picture by default.
    """

    video_frames: int | None = None
    height: int | None = None
    width: int | None = None

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        video, latents = record["video"], {name: record[name] for name in ("mean", "std")}
        frames, *sides = video.shape[:3]
        count, *cells = latents["mean"].shape[:3]
        frame_factor = (frames - 1) // max(count - 1, 1)
        shown = self.video_frames or frames
        if shown > frames or (shown - 1) % max(frame_factor, 1):
            raise UserError(
                f"video_frames {shown} is no beginning of clips of {frames} frames whose latents stand for "
                f"{frame_factor} frames each: use {frame_factor}k + 1, at most {frames}"
            )
        video = video[:shown]
        latents = {k: v[: (shown - 1) // max(frame_factor, 1) + 1] for k, v in latents.items()}
        for axis, (name, wanted, side, cell) in enumerate(
            zip(("height", "width"), (self.height, self.width), sides, cells, strict=True), start=1
        ):
            if wanted is None:
                continue
            factor = side // cell
            if wanted > side or wanted % factor:
                raise UserError(
                    f"{name} {wanted} is no part of clips of {side} pixels with latents of {cell}: use a multiple of "
                    f"{factor}, at most {side}"
                )
            first = int(rng.integers(cell - wanted // factor + 1))
            latents = {k: v.take(range(first, first + wanted // factor), axis) for k, v in latents.items()}
            video = video.take(range(first * factor, first * factor + wanted), axis)
        return {"video": video.astype(np.float32) / np.float32(127.5) - np.float32(1), **latents}
