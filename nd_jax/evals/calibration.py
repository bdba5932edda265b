"""Block importance along real sampling: what a batch of prompts tells about every block of a teacher.

Rollouts are those of `generate.pipeline.sample_latents` from the same seed and ids, observed at every call of the
transformer (`block_importance`). Their latents are then what the states of `leave_one_out` are made from.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nd_jax.evals.block_importance import observe_influence
from nd_jax.evals.leave_one_out import final_latent_error, probe_velocity, relative_error, without_blocks
from nd_jax.generate.config import SamplerConfig
from nd_jax.generate.model_folder import ModelFolder
from nd_jax.generate.sampler import draw_noise, prompt_keys, rollout_stages
from nd_jax.models.attention import default_attention
from nd_jax.models.mmdit import PyramidMMDiT
from nd_jax.models.text_conditioning import Conditioning
from nd_jax.train.sharding import batch_sharding, replicated
from nd_jax.weights.folder import load_component

BRANCHES = {1: ("prompt",), 2: ("negative", "prompt")}


class Call(NamedTuple):
    """One call of the transformer for one branch of guidance."""

    unit: int
    stage: int
    step: int
    branch: str


def rollout_calls(config: SamplerConfig) -> list[Call]:
    """All calls of a rollout in their order."""
    calls = []
    for unit in config.sampled_units:
        steps, guidance = config.unit_settings(unit == 0)
        branches = BRANCHES[1 if guidance is None else 2]
        calls += [
            Call(unit, stage, step, branch)
            for stage, count in enumerate(steps)
            for step in range(count)
            for branch in branches
        ]
    return calls


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The network whose blocks are judged, on its devices, and how it samples.

    Attributes:
      model, params: of the transformer.
      config: of the rollouts, which make all latent frames.
      mesh: splits batches over its data axis; None for one device.
    """

    model: PyramidMMDiT
    params: Mapping[str, Any]
    config: SamplerConfig
    mesh: Mesh | None = None

    @property
    def removable(self) -> range:
        """All blocks but the last."""
        return range(self.model.config.num_layers - 1)

    def place(self, tree: Any) -> Any:
        """Arrays with rows on axis 0, on the devices."""
        return jax.tree.map(jnp.asarray, tree) if self.mesh is None else jax.device_put(tree, batch_sharding(self.mesh))


def load_teacher(folder: ModelFolder, dtype: Any, mesh: Mesh | None = None) -> Teacher:
    """Reads the transformer; every device of the mesh holds all of it.

    Raises:
      UserError: damaged weights, or settings that do not fit the model.
    """
    config = folder.sampler()
    model = PyramidMMDiT(folder.transformer, dtype=dtype, param_dtype=dtype, attention=default_attention())
    params = load_component(folder.path("transformer"), folder.transformer_network, dtype).params
    params = jax.tree.map(jnp.asarray, params) if mesh is None else jax.device_put(params, replicated(mesh))
    return Teacher(model, params, config, mesh)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts side by side.

    Attributes:
      text: their conditioning, B rows.
      negative: one row, or None without guidance.
      ids: [B], whose noise they get.
      seed: of all noise.
    """

    text: Conditioning
    negative: Conditioning | None
    ids: Sequence[int]
    seed: int

    def keys(self) -> tuple[jax.Array, jax.Array]:
        """Keys of the rollouts' noise and of the states of `Probe`, [B] each."""
        keys = jax.vmap(jax.random.split)(prompt_keys(self.seed, np.asarray(self.ids)))
        return keys[:, 0], keys[:, 1]


def observe_rollouts(
    teacher: Teacher, batch: Batch, on_stage: Callable[[], None] = lambda: None
) -> tuple[dict[str, np.ndarray], jax.Array]:
    """Importance of every block at every call: ({"image": [B, calls, S], "text": [B, calls, S - 1]}, latents).

    Float32; calls as in `rollout_calls`. `on_stage` is called after every stage of every unit.
    """
    noise = draw_noise(batch.keys()[0], teacher.config, teacher.model.config.in_channels)
    observed: dict[str, list[np.ndarray]] = {"image": [], "text": []}
    for end in rollout_stages(
        teacher.model,
        teacher.params,
        teacher.config,
        batch.text,
        noise,
        batch.negative,
        mesh=teacher.mesh,
        observe=observe_influence,
    ):
        for name, leaf in end.observed.items():
            array = np.asarray(leaf)
            observed[name].append(array.reshape(len(array), -1, array.shape[-1]))
        on_stage()
    return {name: np.concatenate(arrays, axis=1) for name, arrays in observed.items()}, end.latents


def rollout_errors(
    teacher: Teacher, batch: Batch, latents: jax.Array, on_block: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Error of the final latents without each of the removable blocks, float32 [B, S - 1]."""
    noise = draw_noise(batch.keys()[0], teacher.config, teacher.model.config.in_channels)
    errors = []
    for block in teacher.removable:
        errors.append(
            final_latent_error(
                *(teacher.model, teacher.params, teacher.config, batch.text, noise, batch.negative, teacher.mesh),
                latents,
                (block,),
            )
        )
        on_block()
    return np.stack([np.asarray(error) for error in errors], axis=1)


class Probe:
    """Training states of a batch, and the velocities that the whole network gives for them.

    Args:
      teacher: the network.
      batch: says which states are drawn.
      latents: that it sampled, [B, T, H, W, C].
      draws: states of every row and stage.
    """

    def __init__(self, teacher: Teacher, batch: Batch, latents: Any, draws: int):
        self._teacher, negative = teacher, batch.negative
        if negative is not None:
            negative = jax.tree.map(lambda n, t: np.broadcast_to(n, t.shape), negative, batch.text)
        self._arrays = teacher.place((jnp.asarray(latents), batch.text, negative, batch.keys()[1]))
        self._which = [(s, d) for s in range(teacher.config.video.stages) for d in range(draws)]
        self._whole = [self._velocity(teacher.model, teacher.params, *which) for which in self._which]

    def error_without(self, removed: Sequence[int]) -> np.ndarray:
        """Velocity error without some blocks, a mean over draws for every row and stage, float32 [B, stages]."""
        model, params = without_blocks(self._teacher.model, self._teacher.params, removed)
        errors = [
            relative_error(self._velocity(model, params, *which), whole)
            for which, whole in zip(self._which, self._whole, strict=True)
        ]
        return np.stack(errors, axis=1).reshape(len(errors[0]), self._teacher.config.video.stages, -1).mean(axis=-1)

    def _velocity(self, model: PyramidMMDiT, params: Mapping[str, Any], stage: int, draw: int) -> jax.Array:
        static = dict(model=model, config=self._teacher.config, stage=stage)
        return probe_velocity(params, *self._arrays, np.int32(draw), **static)
