"""UNet2DConditionModel of the SDXL family, of which SSD-1B, the generator of the first frame, is a pruned member.

    temb  = MLP(sinusoid(timestep) + W_w w) + MLP([pooled text, sinusoids of the six sizes])         (1)
    down  : residual blocks, each with a transformer behind it or not, then a convolution of stride 2  (2)
    mid   : one residual block; in SDXL itself also a transformer and a second one                     (3)
    up    : residual blocks on [x, skip], with transformers or not, then twice the pixels              (4)
    noise = conv(silu(n(x)))                                                                           (5)

`W_w w` is there only in networks distilled to take a guidance scale (`time_cond_proj_dim`). Every residual block takes
silu(temb). Skips are the outputs of the first convolution and of everything in (2), taken in reverse order. How many
transformer blocks stand behind each residual block is what SSD-1B prunes (Gupta et al. 2024, arXiv:2401.02677): the
config has one number for each. Agrees with `diffusers.UNet2DConditionModel`.

Shape letters: B batch, C latent channels, T text tokens, E text width, P pooled width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from nd_jax.models.attention import ATTENTION
from nd_jax.models.image_layers import PAD_AROUND, Downsample, GroupNorm, ResidualBlock, Upsample
from nd_jax.models.layers import ConditioningMLP, sinusoid
from nd_jax.models.unet_layers import ImageTransformer

TIME_IDS = 6  # Original height and width, top and left of the crop, target height and width, in pixels.

DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # Whether transformers are in it.
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_TYPES = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}

LOGICAL_AXES = (
    (r"attention/(query|key|value)/kernel$", ("layers", "embed", "heads")),
    (r"attention/out/kernel$", ("layers", "heads", "embed")),
    # Value and gate side by side: a split of the columns would cut across them.
    (r"mlp/up/kernel$", ("layers", "embed", None)),
    (r"mlp/down/kernel$", ("layers", "mlp", "embed")),
    (r"(time|size)_embedding/hidden/kernel$", ("embed", "mlp")),
    (r"(time|size)_embedding/out/kernel$", ("mlp", "embed")),
    # Kernels of convolutions (row, column, in, out) and of the other layers (in, out).
    (r"kernel$", (None, None, None, "embed")),
)

PerBlock = int | tuple[int, ...]
Depths = int | tuple[int | tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Names of `diffusers.UNet2DConditionModel`; the defaults are SSD-1B's.

    Attributes:
      layers_per_block: residual blocks of a down block; an up block has one more.
      attention_head_dim: the NUMBER of heads, by a misnomer that diffusers keeps.
      transformer_layers_per_block: blocks of each transformer, down; a number for all, or per down block a number or
        one for each of its transformers. Entries of blocks without transformers are not used.
      reverse_transformer_layers_per_block: the same for the up blocks, in their order; None for the other one reversed.
      projection_class_embeddings_input_dim: P + 6 * addition_time_embed_dim.
      time_cond_proj_dim: width of the guidance scale's embedding, None for a network that takes none.
      sample_size: side of the latents in training; carried along.

    Raises:
      ValueError: lists of unlike lengths, unknown block types, or widths that do not divide.
    """

    sample_size: int | tuple[int, int] | None = 128
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: PerBlock = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 2048
    transformer_layers_per_block: Depths = (1, (2, 2), (4, 4))
    reverse_transformer_layers_per_block: Depths | None = ((4, 4, 10), (2, 1, 1), 1)
    attention_head_dim: PerBlock = (5, 10, 20)
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    time_cond_proj_dim: int | None = None

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        for name in (
            *("down_block_types", "up_block_types", "layers_per_block", "attention_head_dim"),
            *("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != blocks:
                raise ValueError(f"{name} has {len(value)} entries, block_out_channels {blocks}")
        for name, known in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            for block in getattr(self, name):
                if block not in known:
                    raise ValueError(f"{name} has {block!r}: only {' and '.join(known)} are supported")
        if self.mid_block_type not in (None, *MID_TYPES):
            known = " and ".join(MID_TYPES)
            raise ValueError(
                f"mid_block_type is {self.mid_block_type!r}: only {known}, and null for none, are supported"
            )
        nested = isinstance(self.transformer_layers_per_block, tuple) and any(
            isinstance(entry, tuple) for entry in self.transformer_layers_per_block
        )
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ValueError(
                "transformer_layers_per_block has lists in it: give reverse_transformer_layers_per_block, too"
            )
        down = down_stages(self)
        stages = (*down, *up_stages(self))
        with_text = [stage for stage in stages if any(stage.depths)] + [down[-1]] * bool(mid_depth(self))
        for name, divisors in (
            ("norm_num_groups", {(stage.width, self.norm_num_groups) for stage in stages}),
            ("attention_head_dim", {(stage.width, stage.heads) for stage in with_text}),
        ):
            for width, count in sorted(divisors):
                if width % count:
                    raise ValueError(f"{name} {count} does not divide the width {width}")
        if self.pooled_dim < 1:
            raise ValueError(
                f"projection_class_embeddings_input_dim is {self.projection_class_embeddings_input_dim}: the six sizes "
                f"alone take {TIME_IDS * self.addition_time_embed_dim}"
            )

    @property
    def pooled_dim(self) -> int:
        """P, width of the pooled text."""
        return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

    @property
    def time_dim(self) -> int:
        """Width of temb."""
        return 4 * self.block_out_channels[0]


class Stage(NamedTuple):
    """One resolution on the way down or up.

    Attributes:
      name: of its parameters, "down_0".
      width: output channels.
      inputs: input channels of each residual block.
      depths: blocks of the transformer behind each residual block, 0 for none.
      heads: of these transformers.
      resamples: whether it ends with half or twice the rows and columns.
    """

    name: str
    width: int
    inputs: tuple[int, ...]
    depths: tuple[int, ...]
    heads: int
    resamples: bool


def down_stages(config: UNetConfig) -> tuple[Stage, ...]:
    """The down blocks, finest first."""
    stages, previous = [], config.block_out_channels[0]
    for i, width in enumerate(config.block_out_channels):
        layers = _entry(config.layers_per_block, i)
        inputs = (previous, *(width,) * (layers - 1))
        has_text = DOWN_TYPES[config.down_block_types[i]]
        depths = _depths("transformer_layers_per_block", config.transformer_layers_per_block, i, layers, has_text)
        last = i == len(config.block_out_channels) - 1
        stages.append(Stage(f"down_{i}", width, inputs, depths, _entry(config.attention_head_dim, i), not last))
        previous = width
    return tuple(stages)


def up_stages(config: UNetConfig) -> tuple[Stage, ...]:
    """The up blocks, coarsest first; their residual blocks also take a skip."""
    down = down_stages(config)
    skips = [config.block_out_channels[0]]
    for stage in down:
        skips += [stage.width] * (len(stage.inputs) + stage.resamples)
    per_block, name = config.reverse_transformer_layers_per_block, "reverse_transformer_layers_per_block"
    if per_block is None:
        per_block, name = config.transformer_layers_per_block, "transformer_layers_per_block"
        per_block = per_block[::-1] if isinstance(per_block, tuple) else per_block
    stages, previous = [], down[-1].width
    for i, below in enumerate(reversed(down)):
        layers = len(below.inputs) + 1
        inputs = tuple((previous if j == 0 else below.width) + skips.pop() for j in range(layers))
        depths = _depths(name, per_block, i, layers, UP_TYPES[config.up_block_types[i]])
        stages.append(Stage(f"up_{i}", below.width, inputs, depths, below.heads, i < len(down) - 1))
        previous = below.width
    return tuple(stages)


def mid_depth(config: UNetConfig) -> int:
    """Blocks of the transformer in the middle, 0 for none."""
    if not MID_TYPES.get(config.mid_block_type):
        return 0
    last = _entry(config.transformer_layers_per_block, len(config.block_out_channels) - 1)
    return last[0] if isinstance(last, tuple) else last


def _entry(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, tuple) else value


def _depths(name: str, per_block: Depths, index: int, layers: int, has_text: bool) -> tuple[int, ...]:
    if not has_text:
        return (0,) * layers
    entry = _entry(per_block, index)
    depths = entry if isinstance(entry, tuple) else (entry,) * layers
    if len(depths) != layers or min(depths) < 1:
        raise ValueError(f"{name}[{index}] is {entry!r}: give a number of at least 1 for each of {layers} transformers")
    return depths


class UNetOutput(NamedTuple):
    """`prediction` float32 [B, H, W, C].

    `states`, where asked for, has the two parts of equation 1, `time_embedding` and `size_embedding` [B, 4 * c], and
    the outputs of all blocks under their names: `down_0`, ..., `mid`, `up_0`, ...
    """

    prediction: jax.Array
    states: dict[str, jax.Array] | None


class UNet(nn.Module):
    """The denoiser of the first frame.

    Attributes:
      config: sizes.
      dtype: computation dtype; norms and softmax are float32 whatever it is.
      param_dtype: dtype of initialised parameters.
      attention: a key of `ATTENTION`: "xla" for accelerators, "cached" for processors.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention: str = "xla"

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"attention {self.attention!r} is not one of {', '.join(ATTENTION)}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        context: jax.Array,
        pooled: jax.Array,
        time_ids: jax.Array,
        guidance: jax.Array | None = None,
        return_states: bool = False,
    ) -> UNetOutput:
        """Predicted noise (or what the scheduler's `prediction_type` says).

        Args:
          latents: [B, H, W, C], times the autoencoder's scaling factor; any H and W.
          timestep: [B], 0..999.
          context: [B, T, E], penultimate states of both CLIP text models side by side.
          pooled: [B, P], projection of the second one.
          time_ids: [B, 6], pixels, see `TIME_IDS`.
          guidance: [B, time_cond_proj_dim], see `nd_jax.generate.lcm.guidance_embedding`.
          return_states: also return `UNetOutput.states`; static.

        Raises:
          ValueError: `guidance` is missing, or given to a network that takes none.
        """
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if (guidance is None) != (cfg.time_cond_proj_dim is None):
            given = "no guidance is given" if guidance is None else "guidance is given"
            raise ValueError(f"time_cond_proj_dim is {cfg.time_cond_proj_dim} and {given}")
        time, sizes = self._conditioning(timestep, pooled, time_ids, guidance)
        states = {"time_embedding": time, "size_embedding": sizes}
        time, context = nn.silu(time + sizes), context.astype(self.dtype)

        x = nn.Conv(cfg.block_out_channels[0], (3, 3), name="conv_in", **dtypes)(latents.astype(self.dtype))
        skips = [x]
        for stage in down_stages(cfg):
            for j, depth in enumerate(stage.depths):
                x = self._layer(f"{stage.name}_block_{j}", stage.width, depth, stage.heads, x, time, context)
                skips.append(x)
            if stage.resamples:
                x = Downsample(PAD_AROUND, name=f"{stage.name}_sample", **dtypes)(x)
                skips.append(x)
            states[stage.name] = x

        if cfg.mid_block_type is not None:
            width, depth, heads = stage.width, mid_depth(cfg), stage.heads
            x = self._layer("mid_block_0", width, depth, heads, x, time, context)
            if depth:
                x = self._layer("mid_block_1", width, 0, heads, x, time, context)
            states["mid"] = x

        for stage in up_stages(cfg):
            for j, depth in enumerate(stage.depths):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._layer(f"{stage.name}_block_{j}", stage.width, depth, stage.heads, x, time, context)
            if stage.resamples:
                x = Upsample(name=f"{stage.name}_sample", **dtypes)(x, skips[-1].shape[1:3])
            states[stage.name] = x

        x = nn.silu(GroupNorm(cfg.norm_num_groups, cfg.norm_eps, self.param_dtype, name="norm_out")(x))
        prediction = nn.Conv(cfg.out_channels, (3, 3), name="conv_out", **dtypes)(x)
        return UNetOutput(prediction.astype(jnp.float32), states if return_states else None)

    def _conditioning(
        self, timestep: jax.Array, pooled: jax.Array, time_ids: jax.Array, guidance: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The two terms of equation 1, [B, 4 * c] each."""
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = cfg.block_out_channels[0]
        steps = sinusoid(timestep, width).astype(self.dtype)
        if guidance is not None:
            project = nn.Dense(width, use_bias=False, name="guidance_projection", **dtypes)
            steps = steps + project(guidance.astype(self.dtype))
        numbers = sinusoid(time_ids.reshape(-1), cfg.addition_time_embed_dim).reshape(len(time_ids), -1)
        sizes = jnp.concatenate([pooled.astype(self.dtype), numbers.astype(self.dtype)], axis=-1)
        embed = lambda name: ConditioningMLP(cfg.time_dim, name=name, **dtypes)
        return embed("time_embedding")(steps), embed("size_embedding")(sizes)

    def _layer(
        self, name: str, width: int, depth: int, heads: int, x: jax.Array, time: jax.Array, context: jax.Array
    ) -> jax.Array:
        """A residual block and the transformer behind it, if there is one."""
        cfg, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = ResidualBlock(width, cfg.norm_num_groups, cfg.norm_eps, name=name, **dtypes)(x, time)
        if depth:
            transformer = ImageTransformer(
                depth, heads, cfg.norm_num_groups, self.attention, name=f"{name}_transformer", **dtypes
            )
            x = transformer(x, context)
        return nn.with_logical_constraint(x, ("batch", None, None, "activation_embed"))
