"""PyramidMMDiT: the pyramidal video transformer of Neodragon, and with a context embedder that of Pyramid-Flow.

    h_img  = W_patch tokens + P                      (P: spatial positions, see `positions.py`)       (1)
    h_txt  = context,  or W_ctx context + b_ctx      (teacher: T5 tokens through the embedder)        (2)
    temb   = MLP(sinusoid(timestep)) + MLP(pooled)                                                    (3)
    h_img, h_txt = blocks(h_img, h_txt, silu(temb))  (see `mmdit_block.py`; the last one has no text) (4)
    [g, s] = W_norm silu(temb) + b_norm                                                               (5)
    velocity = W_out (n(h_img) (1 + g) + s) + b_out, for the current clip's tokens                    (6)

Tokens are patches flattened as (row, column, channel), on the way in as on the way out; `nd_jax.pyramid.layout` makes
them and everything that depends on their places. Agrees with `PyramidMMDiT` and `PyramidDiffusionMMDiT`.

The blocks before the last are stacked on axis 0 (`blocks/...`), the last has its own structure (`last_block/...`).

Shape letters: B batch, N image tokens, M tokens of the current clip, T text tokens, C latent channels, p patch size,
D model width, E context width, S number of blocks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nd_jax.models.attention import ATTENTION
from nd_jax.models.layers import ConditioningMLP, sinusoid
from nd_jax.models.mmdit_block import JointBlock, TokenGeometry, modulate

SINUSOID_CHANNELS = 256

# What the backward pass recomputes: nothing, whole blocks, or blocks without their matrix products with weights.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

LOGICAL_AXES = (
    (r"(image|text)/(query|key|value)/kernel$", ("layers", "embed", "heads")),
    (r"(image|text)/out/kernel$", ("layers", "heads", "embed")),
    (r"(image|text)/mlp_up/kernel$", ("layers", "embed", "mlp")),
    (r"(image|text)/mlp_down/kernel$", ("layers", "mlp", "embed")),
    # Six vectors side by side: a split of the columns would cut across them.
    (r"(image|text)/modulation/kernel$", ("layers", "embed", None)),
    (r"(timestep|pooled)_embedder/hidden/kernel$", ("embed", "mlp")),
    (r"(timestep|pooled)_embedder/out/kernel$", ("mlp", "embed")),
    (r"context_embedder/kernel$", ("embed", "mlp")),
    (r"norm_out/kernel$", ("embed", None)),
    (r"proj_out/kernel$", ("embed", None)),
)


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Names and defaults of the public PyramidMMDiT, and whether the teacher's context embedder is there.

    `sample_size`, `patch_size` and `pos_embed_max_size` shape the spatial table; `max_num_frames` and, without a
    context embedder, `joint_attention_dim` and `caption_projection_dim` are carried along unused.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    max_num_frames: int = 200
    context_embedder: bool = False

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}: a transformer has at least 1 block")
        if self.attention_head_dim % 2 or self.inner_dim % 4:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} x {self.num_attention_heads} heads: rotation needs an "
                "even head and the spatial table a width that 4 divides"
            )
        if self.context_embedder and self.caption_projection_dim != self.inner_dim:
            raise ValueError(
                f"caption_projection_dim is {self.caption_projection_dim}: with a context embedder it must be the "
                f"model width {self.inner_dim}"
            )

    @property
    def inner_dim(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def context_dim(self) -> int:
        """Width of the text tokens that the model takes."""
        return self.joint_attention_dim if self.context_embedder else self.inner_dim

    @property
    def token_dim(self) -> int:
        """Numbers in one patch of latents."""
        return self.patch_size**2 * self.in_channels


class BlockStates(NamedTuple):
    """Residual streams around the blocks: index k is block k's input, the last image entry the last block's output.

    `image` is [S + 1, B, N, D], `text` [S, B, T, D]: the last block has no text output. Where only some numbers were
    asked for, these alone, in their order.
    """

    image: jax.Array
    text: jax.Array


class MMDiTOutput(NamedTuple):
    """`velocity` float32 [B, M, p * p * C], patches of the current clip; `states` is None when not asked for."""

    velocity: jax.Array
    states: BlockStates | None


def timestep_sinusoid(timestep: jax.Array) -> jax.Array:
    """float [B], values 0..1000 -> float32 [B, 256], cosines first, frequencies 10000^(-i/128)."""
    return sinusoid(timestep, SINUSOID_CHANNELS)


class PatchEmbed(nn.Module):
    """Equation 1 without positions: patches [B, N, p * p * C] -> [B, N, D]. The kernel is that of a convolution."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg = self.config
        shape = (cfg.patch_size, cfg.patch_size, cfg.in_channels, cfg.inner_dim)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(in_axis=(0, 1, 2)), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (cfg.inner_dim,), self.param_dtype)
        kernel = kernel.reshape(cfg.token_dim, cfg.inner_dim).astype(self.dtype)
        return tokens.astype(self.dtype) @ kernel + bias.astype(self.dtype)[None, None]


class _ScannedBlock(JointBlock):
    """`JointBlock` as `nn.scan` wants it: the carry in and out, and the block's input if all inputs are asked for.

    The carry is both streams and, where only some inputs are asked for, a buffer for each stream: the input goes to its
    row `place`, and nowhere if there is no such row.
    """

    keep_input: bool = False

    def __call__(self, carry, place, conditioning_BD, geometry):
        streams, kept = carry
        if kept is not None:
            kept = jax.tree.map(lambda rows, x: rows.at[place].set(x, mode="drop"), kept, streams)
        return (super().__call__(*streams, conditioning_BD, geometry), kept), (streams if self.keep_input else None)


class PyramidMMDiT(nn.Module):
    """The video transformer; `conditioning` and `embed_context` are its parts that an exporter runs on the host.

    Attributes:
      config: sizes.
      dtype: computation dtype; norms, softmax and modulation are float32 whatever it is.
      param_dtype: dtype of initialised parameters.
      remat: a key of `REMAT`.
      attention: a key of `ATTENTION`: "xla" for accelerators, "splash" for TPUs, "cudnn" for GPUs, "cached" for
        processors.
      scan: one program for all blocks before the last, over stacked parameters. Without it the parameters are those of
        `unstack_blocks`.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    scan: bool = True

    def __post_init__(self):
        for name, value, known in (("remat", self.remat, REMAT), ("attention", self.attention, ATTENTION)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        super().__post_init__()

    def setup(self):
        cfg = self.config
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.patch_embed = PatchEmbed(cfg, **dtypes)
        self.timestep_embedder = ConditioningMLP(cfg.inner_dim, **dtypes)
        self.pooled_embedder = ConditioningMLP(cfg.inner_dim, **dtypes)
        if cfg.context_embedder:
            self.context_embedder = nn.Dense(cfg.inner_dim, **dtypes)

    def conditioning(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        """Equation 3: float [B], [B, pooled_projection_dim] -> temb [B, D], before the SiLU."""
        sinusoid = timestep_sinusoid(timestep).astype(self.dtype)
        return self.timestep_embedder(sinusoid) + self.pooled_embedder(pooled.astype(self.dtype))

    def block_conditioning(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        """silu(temb) [B, D], what the blocks take."""
        return nn.silu(self.conditioning(timestep, pooled))

    def embed_context(self, context: jax.Array) -> jax.Array:
        """Equation 2: [B, T, E] -> [B, T, D]."""
        context = context.astype(self.dtype)
        return self.context_embedder(context) if self.config.context_embedder else context

    def embed_tokens(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Equation 1: patches [B, N, p * p * C], positions [B or 1, N, D] -> [B, N, D]."""
        return (self.patch_embed(tokens).astype(jnp.float32) + positions).astype(self.dtype)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        context: jax.Array,
        pooled: jax.Array,
        timestep: jax.Array,
        geometry: TokenGeometry,
        output_tokens: int | None = None,
        return_block_states: bool | tuple[int, ...] = False,
        current_unseen: bool = False,
    ) -> MMDiTOutput:
        """Velocity of the current clip.

        Args:
          tokens: [B, N, p * p * C], patches of [padding, history, current clip].
          context: [B, T, context_dim], text tokens.
          pooled: [B, pooled_projection_dim], pooled text.
          timestep: float [B], the stage's own timestep, 0..1000.
          geometry: of the layout; it says which tokens see each other.
          output_tokens: M, how many of the last tokens are the current clip's; all when None; static.
          return_block_states: also return both streams around every block, or only the states of rising numbers 0..S
            of `BlockStates`, in memory for these alone. That is for frozen networks: with a gradient and remat, every
            block would save all of them. Static.
          current_unseen: the mask hides the current clip from all other tokens, in every sample; static. Attention
            leaves those pairs out. So it is wherever there is a history (`TokenLayout.current_unseen`).

        Raises:
          ValueError: `current_unseen` without `output_tokens`.
        """
        cfg = self.config
        if current_unseen and output_tokens is None:
            raise ValueError("current_unseen says that nothing sees the current clip: give output_tokens, its length")
        activation = ("batch", "length", "activation_embed")
        image = nn.with_logical_constraint(self.embed_tokens(tokens, geometry.positions), activation)
        text = nn.with_logical_constraint(self.embed_context(context), activation)
        conditioning = self.block_conditioning(timestep, pooled)
        conditioning = nn.with_logical_constraint(conditioning, ("batch", "activation_embed"))

        sizes = dict(
            heads=cfg.num_attention_heads,
            head_dim=cfg.attention_head_dim,
            attention=self.attention,
            unseen=output_tokens if current_unseen else 0,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        wanted = tuple(range(cfg.num_layers + 1)) if return_block_states is True else tuple(return_block_states or ())
        if list(wanted) != sorted(set(wanted)) or not set(wanted) <= set(range(cfg.num_layers + 1)):
            raise ValueError(f"block states {wanted}: give rising numbers of 0..{cfg.num_layers}")
        (image, text), states = self._blocks((image, text), conditioning, geometry, sizes, wanted)
        before = (image, text)
        image, _ = self._remat(JointBlock)(last=True, name="last_block", **sizes)(image, text, conditioning, geometry)
        if wanted:
            ends = [(cfg.num_layers - 1, before), (cfg.num_layers, (image, None))]
            rows = [] if states is None else [states]
            rows += [jax.tree.map(lambda x: x[None], end) for number, end in ends if number in wanted]
            images, texts = zip(*rows, strict=True)
            texts = [rows for rows in texts if rows is not None] or [jnp.zeros((0, *text.shape), text.dtype)]
            states = BlockStates(jnp.concatenate(images), jnp.concatenate(texts))

        dense = lambda features, name: nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=nn.initializers.zeros, name=name
        )
        modulation = dense(2 * cfg.inner_dim, "norm_out")(conditioning).astype(jnp.float32)
        scale, shift = jnp.split(modulation, 2, axis=-1)
        current = image if output_tokens is None else image[:, image.shape[1] - output_tokens :]
        velocity = dense(cfg.token_dim, "proj_out")(modulate(current, shift, scale).astype(self.dtype))
        return MMDiTOutput(velocity.astype(jnp.float32), states if wanted else None)

    def _remat(self, block: type[nn.Module]) -> type[nn.Module]:
        return block if self.remat == "none" else nn.remat(block, policy=REMAT[self.remat], prevent_cse=False)

    def _blocks(
        self, streams: tuple, conditioning: jax.Array, geometry: TokenGeometry, sizes: dict, wanted: tuple[int, ...]
    ) -> tuple[tuple, tuple | None]:
        """All blocks but the last: (the streams behind them, the wanted inputs of both streams or None)."""
        count = self.config.num_layers - 1
        wanted = [number for number in wanted if number < count]
        block, every = self._remat(_ScannedBlock), bool(wanted) and len(wanted) == count
        kept = None
        if wanted and not every:
            kept = jax.tree.map(lambda x: jnp.zeros((len(wanted), *x.shape), x.dtype), streams)
        places = np.full(count, len(wanted), np.int32)
        places[wanted] = np.arange(len(wanted))
        if count and self.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=count,
            )(keep_input=every, name="blocks", **sizes)
            (streams, kept), inputs = scanned((streams, kept), jnp.asarray(places), conditioning, geometry)
            return streams, inputs if every else kept
        inputs = []
        for k in range(count):
            keeping = block(keep_input=k in wanted, name=f"block_{k}", **sizes)
            (streams, _), before = keeping((streams, None), 0, conditioning, geometry)
            inputs += [before] if k in wanted else []
        return streams, jax.tree.map(lambda *x: jnp.stack(x), *inputs) if inputs else None


def unstack_blocks(params: dict) -> dict:
    """`blocks/...` [S - 1, ...] -> `block_0/...`, `block_1/...`: the parameters of a model with `scan=False`."""
    stacked = params.get("blocks", {})
    count = jax.tree.leaves(stacked)[0].shape[0] if stacked else 0
    blocks = {f"block_{k}": jax.tree.map(lambda leaf, k=k: leaf[k], stacked) for k in range(count)}
    return {name: tree for name, tree in params.items() if name != "blocks"} | blocks


def stack_blocks(params: dict) -> dict:
    """The inverse of `unstack_blocks`; numpy arrays stay numpy."""
    blocks = [params[f"block_{k}"] for k in range(sum(name.startswith("block_") for name in params))]
    rest = {name: tree for name, tree in params.items() if not name.startswith("block_")}
    if not blocks:
        return rest
    stack = lambda *leaves: (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)
    return rest | {"blocks": jax.tree.map(stack, *blocks)}


def keep_blocks(params: dict, config: MMDiTConfig, kept: Sequence[int]) -> tuple[dict, MMDiTConfig]:
    """Prunes to the blocks `kept`, in their order: (parameters, config).

    Args:
      params: with stacked blocks.
      config: their config.
      kept: block numbers, rising; the last block is among them, because no other has its structure.

    Raises:
      ValueError: numbers that do not rise, do not exist, or leave out the last block.
    """
    last = config.num_layers - 1
    kept = list(kept)
    if kept != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] != last:
        raise ValueError(f"blocks to keep {kept}: give rising numbers of 0..{last}, the last block {last} among them")
    index = np.asarray(kept[:-1], np.int32)
    pruned = {name: tree for name, tree in params.items() if name != "blocks"}
    if len(index):
        pruned["blocks"] = jax.tree.map(lambda leaf: leaf[index], params["blocks"])
    return pruned, dataclasses.replace(config, num_layers=len(kept))
