"""VBench's numbers: quality, semantic and total score of 16 dimensions, and the dimension that needs no network.

A dimension d has a score s_d in [0, 1], a range [min_d, max_d] that stretches it, and a weight w_d:

    n_d = (s_d - min_d) / (max_d - min_d)                                                                (1)
    quality  = sum w_d n_d / sum w_d over the dimensions of quality, semantic the same over the others   (2)
    total    = (4 quality + semantic) / (4 + 1)                                                          (3)

Temporal flickering of a video whose frames x_t are uint8 of 3 channels, and of a folder the mean over its videos:

    s = (255 - mean_t mean |x_{t+1} - x_t|) / 255                                                        (4)

Source: Huang et al., VBench: Comprehensive Benchmark Suite for Video Generative Models, CVPR 2024 (arXiv 2311.17982);
ranges and weights are those of its leaderboard (scripts/constant.py of Vchitect/VBench), (4) is that of vbench 0.1.5.
Every other dimension needs a network that VBench downloads: MUSIQ, DINO, CLIP, AMT, RAFT, GRiT, UMT, Tag2Text, ViCLIP.
"""

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nd_jax.errors import UserError


class Dimension(NamedTuple):
    """Range and weight of equations 1 and 2."""

    minimum: float = 0.0
    maximum: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(maximum=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(maximum=0.364),
    "overall_consistency": Dimension(maximum=0.364),
}
DIMENSIONS = QUALITY | SEMANTIC
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
FLICKERING = "temporal_flickering"


class Totals(NamedTuple):
    """Equations 2 and 3, as fractions; VBench prints percent."""

    quality: float
    semantic: float
    total: float


def normalized(scores: Mapping[str, float]) -> dict[str, float]:
    """n of equation 1 for every dimension.

    Raises:
      UserError: a dimension is missing, or a score is not from -1 to 1.
    """
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        unknown = sorted(set(scores) - set(DIMENSIONS))
        beside = f" (there is {', '.join(unknown)}, which VBench does not know)" if unknown else ""
        raise UserError(
            f"no score for {', '.join(missing)}{beside}: a total needs all {len(DIMENSIONS)} dimensions; score them "
            "with `experiments.evaluate vbench-score`"
        )
    for name in DIMENSIONS:
        # Cosines of an unfit text can be below 0; nothing is above 1.
        if not -1 <= scores[name] <= 1:
            raise UserError(f"{name} is {scores[name]}: scores are fractions up to 1; divide percent by 100")
    return {name: (scores[name] - d.minimum) / (d.maximum - d.minimum) for name, d in DIMENSIONS.items()}


def totals(scores: Mapping[str, float]) -> Totals:
    """Equations 1 to 3.

    Args:
      scores: dimension -> score, all of `DIMENSIONS`.

    Raises:
      UserError: as `normalized`.
    """
    n = normalized(scores)
    means = [
        sum(d.weight * n[name] for name, d in group.items()) / sum(d.weight for d in group.values())
        for group in (QUALITY, SEMANTIC)
    ]
    return Totals(*means, total_score(*means))


def total_score(quality: float, semantic: float) -> float:
    """Equation 3, in whatever unit both have."""
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


# --- result files -----------------------------------------------------------------------------------------------------


def read_scores(paths: Sequence[Path]) -> dict[str, float]:
    """Scores of VBench's result files.

    A JSON object maps dimensions (with spaces or underscores) to a score, or to a list that begins with it, as VBench
    writes them. Beside such files, folders and ZIP files with them are read, where other JSON files may lie too.

    Args:
      paths: files, folders or ZIP files.

    Returns:
      name with underscores -> score; unknown names with a score are among them, and other entries are left out.

    Raises:
      UserError: no such file, not JSON, a dimension without a score, or with two.
    """
    scores: dict[str, float] = {}
    places: dict[str, str] = {}
    for path in paths:
        for place, text in _json_texts(path):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not valid JSON ({error}); score again") from error
            if not isinstance(values, dict):
                if path.is_file() and path.suffix == ".json":
                    raise UserError(f"{place}: not a JSON object of dimensions and scores; give VBench's results")
                continue  # VBench's list of prompts lies beside its results.
            for name, value in values.items():
                name, score = name.strip().lower().replace(" ", "_"), _score(value)
                if score is None and name in DIMENSIONS:
                    raise UserError(f"{place}: {name} is {json.dumps(value)[:60]}, not a score; score it again")
                if score is None:
                    continue
                if scores.setdefault(name, score) != score:
                    raise UserError(f"{name} is {scores[name]} in {places[name]} and {score} in {place}; give one")
                places.setdefault(name, place)
    if not scores:
        raise UserError(f"{', '.join(map(str, paths))}: holds no scores; give VBench's *_eval_results.json")
    return scores


def _json_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, content) of the JSON files behind a path."""
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    # Archives made on a Mac have companions of every file.
                    if name.endswith(".json") and not Path(name).name.startswith(".") and "__MACOSX" not in name:
                        yield f"{path}/{name}", archive.read(name)
            return
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            yield str(file), file.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: not a ZIP file that can be read ({error}); make it again") from error


def _score(value: Any) -> float | None:
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# --- temporal flickering ----------------------------------------------------------------------------------------------


def temporal_flickering(frames: Iterable[np.ndarray]) -> float:
    """Equation 4 of one video, in the arithmetic of VBench: float32 means of a pair of frames and over the pairs.

    With frames in OpenCV's order of channels the result is VBench's to the last bit; any other order has other sums,
    1e-7 away.

    Args:
      frames: uint8 [H, W, 3] each; taken one at a time.

    Raises:
      UserError: fewer than two frames.
    """
    differences, before = [], None
    for frame in frames:
        frame = np.asarray(frame, np.float32)
        if before is not None:
            differences.append(np.mean(np.abs(frame - before)))
        before = frame
    if not differences:
        raise UserError("a video of fewer than two frames has no flickering; make longer ones")
    return (255.0 - float(np.mean(np.array(differences)))) / 255.0


def video_flickering(path: Path) -> float:
    """`temporal_flickering` of a video file.

    Raises:
      UserError: it does not decode, or has fewer than two frames.
    """
    import av

    try:
        with av.open(str(path)) as container:
            return temporal_flickering(frame.to_ndarray(format="bgr24") for frame in container.decode(video=0))
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise UserError(f"{path}: not a video that can be decoded ({error}); make it again") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def folder_flickering(paths: Iterable[Path]) -> list[Any]:
    """Temporal flickering of many videos as VBench's result files hold it: [mean, [{video_path, video_results}]]."""
    results = [{"video_path": str(path), "video_results": video_flickering(path)} for path in paths]
    return [float(np.mean([result["video_results"] for result in results])), results]
