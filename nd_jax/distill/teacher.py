"""The teacher itself: pyramidal flow matching on latents, from scratch or from released weights.

    y, v  = point and velocity of the path of a latent frame u at a stage i, h = its corrupted history           (1)
    L     = mean over rows of |D(y, h, tau, text) - v|^2 / (number of values),  rows of stage 0, 1, 2 as 1:1:1   (2)

(1) is `nd_jax.pyramid.units`, with the corrected path whose two ends share their noise. Every row trains one latent
frame, uniformly drawn; frame 0 has no history, so that images and videos are trained at once. The text of a row is
dropped in the data pipeline (all encoders see the empty prompt), which is what guidance needs.

Source: Pyramid-Flow (arXiv 2410.05954), section 3 and its public training code; Neodragon (arXiv 2511.06055) trains
its recovery and its steps on the same states.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nd_jax.distill.base import Batch, Distillation, Mean, Params, Role, Roles
from nd_jax.models.mmdit import MMDiTConfig, MMDiTOutput, PyramidMMDiT
from nd_jax.models.mmdit_block import TokenGeometry
from nd_jax.models.text_conditioning import Conditioning, TextEncoders, encode_text
from nd_jax.models.traced_once import apply_network
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.pyramid.training import columns_to_stage
from nd_jax.pyramid.units import COUPLINGS, StageUnits, UnitState, draw_unit_randomness, stage_units, unit_state
from nd_jax.weights import networks
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT

TRANSFORMER = "diffusion_transformer_320p"
TEXT_NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclasses.dataclass(frozen=True)
class FlowObjective:
    """Equations 1 and 2.

    Attributes:
      stage_ratios: how many of every sum(stage_ratios) rows train each stage, coarsest first.
      corruption_ratio: largest share of noise in the history.
      coupling: "shared", or "independent" for the wrong objective (`nd_jax.pyramid.units`).
    """

    stage_ratios: tuple[int, ...] = (1, 1, 1)
    corruption_ratio: float = 1 / 3
    coupling: str = "shared"

    def __post_init__(self):
        if self.coupling not in COUPLINGS:
            raise ValueError(f"coupling {self.coupling!r} is not one of {', '.join(COUPLINGS)}")
        if not 0.0 <= self.corruption_ratio <= 1.0:
            raise ValueError(f"corruption_ratio {self.corruption_ratio} is not a share: use 0 to 1")
        columns_to_stage(self.stage_ratios)


@dataclasses.dataclass(frozen=True)
class TeacherModels:
    """Sizes of the networks and of the video, and how the transformer computes.

    Attributes:
      mmdit: with the context embedder.
      text: T5 and the two CLIPs.
      video: in latents.
      text_length: T5 tokens.
      remat, attention: of `PyramidMMDiT`.
    """

    mmdit: MMDiTConfig
    text: TextEncoders
    video: VideoSize
    text_length: int = 128
    remat: str = "none"
    attention: str = "xla"

    def check(self) -> None:
        """Raises ValueError naming the widths that do not fit."""
        pairs = (
            ("context_dim", self.mmdit.context_dim, "the text encoder puts out", self.text.context_dim),
            ("pooled_projection_dim", self.mmdit.pooled_projection_dim, "the CLIPs put out", self.text.pooled_dim),
        )
        for name, wanted, what, given in pairs:
            if wanted != given:
                raise ValueError(f"the transformer's {name} is {wanted}, but {what} {given} channels: set them equal")


class StageBatch(NamedTuple):
    """Rows of one stage, ready for a transformer.

    Attributes:
      state: (1), see `units.UnitState`.
      geometry: of the rows' tokens.
      image_mask: which image tokens are not padding, bool [B, N].
    """

    state: UnitState
    geometry: TokenGeometry
    image_mask: jax.Array


def draw_stage_batch(
    objective: FlowObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    latents: jax.Array,
    text_mask: jax.Array,
    key: jax.Array,
) -> StageBatch:
    """Equation 1 for every row, of a latent frame that is drawn uniformly.

    Args:
      objective, schedule, units: static.
      latents: clean and normalised, [B, T, H, W, C].
      text_mask: [B, L].
      key: which latent frame, time, noise and corruption.
    """
    unit_key, state_key = jax.random.split(key)
    unit = jax.random.randint(unit_key, latents.shape[:1], 0, latents.shape[1])
    randomness = draw_unit_randomness(state_key, units, latents.shape, objective.coupling)
    state = unit_state(schedule, units, latents, unit, randomness, objective.corruption_ratio)
    return stage_batch(units, unit, text_mask, state)


def stage_batch(units: StageUnits, unit: jax.Array, text_mask: jax.Array, state: UnitState) -> StageBatch:
    """A state of units [B] with what the transformer needs to know about its tokens."""
    return StageBatch(state, units.geometry(unit, text_mask), jnp.asarray(units.position_index)[unit] > 0)


def apply_transformer(
    models: TeacherModels,
    config: MMDiTConfig,
    transformer: Params,
    batch: StageBatch,
    text: Conditioning,
    dtype: Any,
    states: bool | tuple[int, ...] = False,
) -> MMDiTOutput:
    """D of equation 2 for rows of one stage; `config` is `models.mmdit` or that of a pruned student."""
    network = PyramidMMDiT(config, dtype=dtype, remat=models.remat, attention=models.attention)
    return apply_network(
        network,
        transformer,
        batch.state.tokens,
        text.context,
        text.pooled,
        batch.state.timestep,
        batch.geometry,
        output_tokens=batch.state.target.shape[1],
        return_block_states=states,
    )


def stage_error(
    models: TeacherModels,
    objective: FlowObjective,
    schedule: PyramidSchedule,
    units: StageUnits,
    transformer: Params,
    latents: jax.Array,
    text: Conditioning,
    key: jax.Array,
    dtype: Any,
) -> jax.Array:
    """Mean squared velocity error of every row at one stage, float32 [B].

    Args:
      models, objective, schedule, units: static.
      transformer: parameters of the MMDiT.
      latents: clean and normalised, [B, T, H, W, C].
      text: of the rows.
      key: which latent frame, time, noise and corruption.
      dtype: computation dtype of the transformer.
    """
    batch = draw_stage_batch(objective, schedule, units, latents, text.mask, key)
    velocity = apply_transformer(models, models.mmdit, transformer, batch, text, dtype).velocity
    return jnp.mean(jnp.square(velocity - batch.state.target), axis=(1, 2))


def each_stage(
    ratios: tuple[int, ...], rows: Any, key: jax.Array, terms: Callable[[int, Any, jax.Array], Any]
) -> dict[int, Any]:
    """What `terms(stage, rows, key)` gives for the rows of every stage; rows go to stages as `ratios` say.

    Args:
      ratios: of the stages.
      rows: any tree of arrays with rows on axis 0.
      key: stage k gets `fold_in(key, k)`.
      terms: called once for every stage that has rows.

    Raises:
      ValueError: the rows do not divide among the ratios.
    """
    columns = columns_to_stage(ratios)
    count = jax.tree.leaves(rows)[0].shape[0]
    if count % len(columns):
        raise ValueError(f"{count} rows do not divide among stage_ratios {ratios}")
    results = {}
    for stage in range(len(ratios)):
        chosen = [k for k, at in enumerate(columns) if at == stage]
        if chosen:
            mine = lambda x, chosen=chosen: _columns(x, len(columns), chosen)
            results[stage] = terms(stage, jax.tree.map(mine, rows), jax.random.fold_in(key, stage))
    return results


def teacher_training(
    models: TeacherModels,
    objective: FlowObjective,
    schedule: PyramidSchedule,
    denoiser: Role,
    text: Role | None,
    dtype: Any = jnp.float32,
) -> Distillation:
    """The method as data.

    Args:
      models: sizes.
      objective: what is learned.
      schedule: the pyramid.
      denoiser: parameters {"diffusion_transformer_320p"}, and the text networks where they train too.
      text: frozen text networks, or None where they are in `denoiser`.
      dtype: computation dtype.
    """
    models.check()
    tables = [stage_units(models.mmdit, models.video, i, models.text_length) for i in range(models.video.stages)]
    if len(objective.stage_ratios) != len(tables):
        raise ValueError(f"stage_ratios {objective.stage_ratios}: give one for each of {len(tables)} stages")
    roles = {"denoiser": denoiser} | ({} if text is None else {"text": text})

    def all_params(given: Roles) -> Params:
        return {**given["denoiser"], **jax.lax.stop_gradient(given.get("text", {}))}

    def errors(params: Params, stage: int, latents: jax.Array, conditioning: Conditioning, key: jax.Array) -> jax.Array:
        return stage_error(
            *(models, objective, schedule, tables[stage]),
            *(params[TRANSFORMER], latents, conditioning, key, dtype),
        )

    def loss(given: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
        params = all_params(given)
        conditioning = encode_text(models.text, params, batch, dtype)
        terms = lambda stage, rows, key: errors(params, stage, *rows, key)
        by_stage = each_stage(objective.stage_ratios, (batch["latents"], conditioning), key, terms)
        total, metrics = Mean(jnp.zeros(()), jnp.zeros(())), {}
        for stage, error in by_stage.items():
            mean = Mean(jnp.sum(error), jnp.float32(error.shape[0]))
            total, metrics[f"loss_stage{stage}"] = total + mean, mean
        return total, metrics

    def evaluate(given: Roles, batch: Batch) -> dict[str, Mean]:
        # The same noise, times and frames for every evaluation: its curve then shows the weights alone.
        params, valid = all_params(given), batch["valid"].astype(jnp.float32)
        conditioning = encode_text(models.text, params, batch, dtype)
        metrics = {}
        for stage in range(len(tables)):
            error = errors(params, stage, batch["latents"], conditioning, jax.random.key(stage))
            metrics[f"velocity_error_stage{stage}"] = Mean(jnp.sum(error * valid), jnp.sum(valid))
        return metrics

    def deploy(given: Roles) -> dict[str, tuple[Any, Any, Params]]:
        params = given["denoiser"]
        parts = {TRANSFORMER: (PYRAMID_FLOW_MMDIT, models.mmdit, params[TRANSFORMER])}
        network = {"text_encoder_3": networks.T5_ENCODER}
        for name in TEXT_NETWORKS:
            if name in params:
                parts[name] = (network.get(name, networks.CLIP_TEXT), getattr(models.text, name), params[name])
        return parts

    return Distillation(
        name="teacher",
        roles=roles,
        losses={"denoiser": loss},
        schedule=("denoiser",),
        evaluate=evaluate,
        summarize=_summarize,
        deploy=deploy,
    )


def _summarize(means: Mapping[str, float]) -> dict[str, float]:
    """The mean over stages beside the errors of each; 0 is perfect, and a network that says 0 has about 1 to 2."""
    return {"velocity_error": sum(means.values()) / len(means), **means}


def _columns(x: jax.Array, count: int, chosen: list[int]) -> jax.Array:
    """Rows k, k + count, ... for every k of `chosen`; rows stay on their device."""
    groups = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return groups[:, chosen[0] : chosen[-1] + 1].reshape(-1, *x.shape[1:])


def init_transformer(key: jax.Array, config: MMDiTConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the transformer (traceable)."""
    network = PYRAMID_FLOW_MMDIT
    inputs = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in network.inputs(config)[:-1]]
    geometry = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), network.inputs(config)[-1])
    return network.module(config, param_dtype=dtype).init(key, *inputs, geometry)["params"]


def init_text(key: jax.Array, text: TextEncoders, dtype: Any = jnp.float32) -> Params:
    """Random parameters of T5 and the two CLIPs (traceable)."""
    params = {}
    for k, name in enumerate(TEXT_NETWORKS):
        network = networks.T5_ENCODER if name == "text_encoder_3" else networks.CLIP_TEXT
        config = getattr(text, name)
        inputs = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in network.inputs(config)]
        module = network.module(config, param_dtype=dtype)
        params[name] = module.init(jax.random.fold_in(key, k), *inputs)["params"]
    return params
