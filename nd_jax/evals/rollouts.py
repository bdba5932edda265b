"""How far a student's rollouts are from its teacher's, from the same noise and text.

    cos = <z, z'> / (|z| |z'|)                                                                                   (1)
    SNR = 20 log10(|z| / |z - z'|)                    dB; infinite where both are equal                          (2)

z and z' are where teacher and student end a stage of a unit (a latent frame): one number for every prompt, unit and
stage. What ends the finest stage is the latent frame itself, and all of these are the video. Every network goes on
from its own frames, so that what it gets wrong in one frame is the history of the next.

Latents are normalised: zeros are their mean, and a network that ignored everything would have cosine 0 and SNR 0.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nd_jax.evals.calibration import Batch, Teacher
from nd_jax.generate.sampler import StageEnd, draw_noise, rollout_stages

# (unit, stage) -> where it ended, [B, 1, h, w, C].
Ends = Mapping[tuple[int, int], np.ndarray]
MEASURES = ("cosine", "snr_db")


def cosine(reference: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Equation 1 of every row, float64 [B]; 0 where one of both is 0."""
    z, other = _rows(reference, got)
    norms = np.linalg.norm(z, axis=1) * np.linalg.norm(other, axis=1)
    return np.sum(z * other, axis=1) / np.where(norms, norms, 1.0)


def snr_db(reference: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Equation 2 of every row, float64 [B]."""
    z, other = _rows(reference, got)
    signal, noise = np.linalg.norm(z, axis=1), np.linalg.norm(z - other, axis=1)
    with np.errstate(divide="ignore"):
        return 20.0 * (np.log10(signal) - np.log10(noise))


def _rows(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(x, np.float64).reshape(len(x), -1) for x in arrays]


def rollout_ends(network: Teacher, batch: Batch, on_stage: Callable[[StageEnd], None] = lambda end: None) -> Ends:
    """Rollouts of a batch: where every stage of every unit ended.

    Args:
      network: teacher or student; its `config` makes all frames.
      batch: prompts, and whose noise they get (that of `generate.pipeline.sample_latents`).
      on_stage: called after every stage.
    """
    noise = draw_noise(batch.keys()[0], network.config, network.model.config.in_channels)
    ends = {}
    for end in rollout_stages(
        *(network.model, network.params, network.config, batch.text, noise, batch.negative), mesh=network.mesh
    ):
        ends[end.unit, end.stage] = np.asarray(end.sample)
        on_stage(end)
    return ends


def video_latents(ends: Ends) -> np.ndarray:
    """The latent frames, normalised, [B, T, h, w, C]."""
    finest = max(stage for _, stage in ends)
    return np.concatenate([ends[place] for place in sorted(ends) if place[1] == finest], axis=1)


def compare_rollouts(reference: Ends, got: Ends) -> dict[str, np.ndarray]:
    """Equations 1 and 2: `MEASURES` at every place [B, units, stages], and "video_" and a measure's name [B].

    Args:
      reference, got: of the same units and stages.
    """
    units, stages = (sorted({place[axis] for place in reference}) for axis in (0, 1))
    measures = dict(zip(MEASURES, (cosine, snr_db), strict=True))

    def at_every_place(measure: Callable) -> np.ndarray:
        by_stage = lambda unit: [measure(reference[unit, stage], got[unit, stage]) for stage in stages]
        return np.stack([np.stack(by_stage(unit), axis=-1) for unit in units], axis=1)

    by_place = {name: at_every_place(measure) for name, measure in measures.items()}
    videos = video_latents(reference), video_latents(got)
    return by_place | {f"video_{name}": measure(*videos) for name, measure in measures.items()}


def summarize_rollouts(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean and standard deviation over prompts of what `compare_rollouts` gave, plain data.

    A number that is not finite, such as the SNR of equal latents, is None.
    """
    summary = {}
    for name, array in values.items():
        with np.errstate(invalid="ignore"):
            summary[name] = {"mean": _plain(array.mean(axis=0)), "std": _plain(array.std(axis=0))}
    return summary


def _plain(value: np.ndarray) -> Any:
    if value.ndim:
        return [_plain(part) for part in value]
    return float(value) if np.isfinite(value) else None
