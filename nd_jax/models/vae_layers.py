"""Layers of the causal video VAE. Everything is channel-last, [B, T, H, W, C].

    y[t] = sum_k W[k] x[s t + k - (K - 1)] + b,   x[t < 0] = 0            causal convolution, stride s in time     (1)
    n(x) = (x - mean) / sqrt(var + 1e-6) * scale + bias                   moments per frame and channel group      (2)
    r(x) = shortcut(x) + conv(silu(n(conv(silu(n(x))))))                  residual block                           (3)
    a(x) = x + O softmax(Q n(x) (K n(x))^T / sqrt(C)) V n(x)              one head over the pixels of a frame      (4)

Time. Only convolutions look at other frames, and only at earlier ones. A clip may therefore be given in consecutive
chunks: where the flax collection `context` is mutable, every convolution leaves the input frames there that its next
call needs, and starts from them instead of zeros. The numbers are those of one call on the whole clip.

Space. With `bands` > 1 a convolution runs on that many bands of rows, each with the rows around it that its kernel
reaches. Norms take their moments from whole frames first and are applied band by band, and attention sees whole
frames, so the numbers are those of the plain call. It saves the activated copies of the frames and the convolutions'
workspaces; inputs and outputs of the layers stay whole, so it takes about a tenth off a decoder call. What bounds
memory is chunks of time.

Agrees with the layers of `CausalVideoVAE` of Pyramid-Flow and `AsymmetricCausalVideoVAE` of Neodragon.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

CONTEXT = "context"
NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Compute:
    """How layers compute: dtypes, bands of rows per convolution, and recomputation in the backward pass.

    Attributes:
      dtype: of the computation; moments and attention logits are float32 whatever it is.
      param_dtype: of initialised parameters.
      bands: bands of rows per convolution, see the module's docstring. Does not change the numbers.
      remat: recompute residual blocks in the backward pass.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    bands: int = 1
    remat: bool = False


class Normalisation(NamedTuple):
    """Equation 2 ready to be applied: `mean` and `scale` float32 [B, T, 1, 1, C], `bias` [1, 1, 1, 1, C]."""

    mean: jax.Array
    scale: jax.Array
    bias: jax.Array

    def apply(self, x: jax.Array) -> jax.Array:
        """x [B, T, any rows, W, C] -> the same shape and dtype."""
        return ((x.astype(jnp.float32) - self.mean) * self.scale + self.bias).astype(x.dtype)


class FrameNorm(nn.Module):
    """Moments and affine part of equation 2: x [B, T, H, W, C] -> `Normalisation`."""

    groups: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Normalisation:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype).astype(jnp.float32)
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, channels // self.groups)
        mean = grouped.mean((2, 3, 5), keepdims=True)
        deviation = jax.lax.rsqrt(jnp.square(grouped - mean).mean((2, 3, 5), keepdims=True) + NORM_EPSILON)
        per_channel = lambda moment: jnp.repeat(moment[..., 0], channels // self.groups, axis=-1)
        wide = lambda vector: vector[None, None, None, None]
        return Normalisation(per_channel(mean), per_channel(deviation) * wide(scale), wide(bias))


class CausalConv(nn.Module):
    """Equation 1: x [B, T, H, W, C] -> [B, T', H', W', features]; zeros around the frame and in front of the clip.

    Without context T' = ceil(T / s); H' and W' are rounded up in the same way.

    Attributes:
      features: output channels.
      size: the kernel's size on all three axes, odd.
      strides: in time, rows and columns.
    """

    features: int
    size: int = 3
    strides: tuple[int, int, int] = (1, 1, 1)
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array, norm: Normalisation | None = None) -> jax.Array:
        """With `norm` the convolution acts on silu(norm(x))."""
        dtype, param_dtype = self.compute.dtype, self.compute.param_dtype
        shape = (self.size,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, param_dtype).astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype).astype(dtype)
        x = x.astype(dtype)
        past = self.get_variable(CONTEXT, "frames") if self.has_variable(CONTEXT, "frames") else None
        if self.size > 1 and self.is_mutable_collection(CONTEXT) and not self.is_initializing():
            self.put_variable(CONTEXT, "frames", self._next_context(x, norm, past))
        if past is None and x.shape[1] == 1:
            kernel = kernel[-1:]  # The other time steps of the kernel meet only the zeros in front of the clip.

        step, rows = self.strides[1], -(-x.shape[2] // self.strides[1])
        edges = [rows * band // self.compute.bands for band in range(self.compute.bands + 1)]
        bands = [
            self._rows(x, norm, past, kernel, start * step, (stop - 1) * step) + bias[None, None, None, None]
            for start, stop in itertools.pairwise(edges)
            if start < stop
        ]
        return bands[0] if len(bands) == 1 else jnp.concatenate(bands, axis=2)

    def _rows(self, x, norm, past, kernel, first: int, last: int) -> jax.Array:
        """The output rows whose kernels are centred on the input rows `first ... last`."""
        reach = self.size // 2
        start, stop = max(0, first - reach), min(x.shape[2], last + reach + 1)
        frames = _activate(x[:, :, start:stop], norm)
        front = kernel.shape[0] - 1
        if past is not None:
            frames, front = jnp.concatenate([past[:, :, start:stop], frames], axis=1), 0
        edges = (start - (first - reach), last + reach + 1 - stop)
        # XLA's 3D convolutions are slow on CPUs, and the gradients of strided ones ten times slower than need be.
        convolve = _convolve_by_frames if jax.default_backend() == "cpu" else _convolve
        return convolve(frames, kernel, self.strides, ((front, 0), edges, (reach, reach)))

    def _next_context(self, x: jax.Array, norm: Normalisation | None, past: jax.Array | None) -> jax.Array:
        """The activated input frames that the kernels of the next call still reach back to."""
        span = self.size - 1
        if past is None:
            past = jnp.zeros((x.shape[0], span, *x.shape[2:]), x.dtype)
        total, recent = past.shape[1] + x.shape[1], slice(max(0, x.shape[1] - span), None)
        if norm is not None:
            norm = norm._replace(mean=norm.mean[:, recent], scale=norm.scale[:, recent])
        frames = jnp.concatenate([past, _activate(x[:, recent], norm)], axis=1)
        done = ((total - self.size) // self.strides[0] + 1) * self.strides[0]
        return frames[:, frames.shape[1] - (total - done) :]


def _convolve(frames: jax.Array, kernel: jax.Array, strides: tuple, padding: tuple) -> jax.Array:
    """The sum over k of equation 1: frames [B, T, H, W, C], kernel [K, R, S, C, F], one (before, after) per axis."""
    return jax.lax.conv_general_dilated(frames, kernel, strides, padding, dimension_numbers=("NTHWC", "THWIO", "NTHWC"))


def _convolve_by_frames(frames: jax.Array, kernel: jax.Array, strides: tuple, padding: tuple) -> jax.Array:
    """`_convolve` as one 2D convolution of all frames for each k, and their sum."""
    (front, _), *edges = padding
    frames = jnp.pad(frames, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))
    span = (frames.shape[1] - len(kernel)) // strides[0] * strides[0] + 1
    total = None
    for k in range(len(kernel)):
        taken = frames[:, k : k + span : strides[0]]
        part = jax.lax.conv_general_dilated(
            taken.reshape(-1, *taken.shape[2:]),
            kernel[k],
            strides[1:],
            edges,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        total = part if total is None else total + part
    return total.reshape(*taken.shape[:2], *total.shape[1:])


def _activate(x: jax.Array, norm: Normalisation | None) -> jax.Array:
    return x if norm is None else nn.silu(norm.apply(x))


class ResidualBlock(nn.Module):
    """Equation 3: [B, T, H, W, C] -> [B, T, H, W, features]; the shortcut is a 1x1x1 convolution where C changes."""

    features: int
    groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda name: FrameNorm(self.groups, self.compute.param_dtype, name=name)
        y = CausalConv(self.features, compute=self.compute, name="conv1")(x, norm("norm1")(x))
        y = CausalConv(self.features, compute=self.compute, name="conv2")(y, norm("norm2")(y))
        if x.shape[-1] != self.features:
            x = CausalConv(self.features, 1, compute=self.compute, name="shortcut")(x)
        return x + y


class FrameAttention(nn.Module):
    """Equation 4: [B, T, H, W, C] -> the same shape; the pixels of one frame attend to each other."""

    groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        dense = lambda name: nn.Dense(
            channels, dtype=self.compute.dtype, param_dtype=self.compute.param_dtype, name=name
        )
        normed = FrameNorm(self.groups, self.compute.param_dtype, name="norm")(x).apply(x)
        pixels = normed.reshape(x.shape[0] * x.shape[1], -1, channels)
        query, key, value = (dense(name)(pixels) for name in ("query", "key", "value"))
        logits = jnp.einsum("nqc,nkc->nqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(logits * channels**-0.5).astype(value.dtype)
        mixed = jnp.einsum("nqk,nkc->nqc", weights, value)
        return x + dense("out")(mixed).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution; the shape stays."""

    groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = residual_block(self.compute)
        x = block(x.shape[-1], self.groups, self.compute, name="block_0")(x)
        x = FrameAttention(self.groups, self.compute, name="attention")(x)
        return block(x.shape[-1], self.groups, self.compute, name="block_1")(x)


def residual_block(compute: Compute) -> type[nn.Module]:
    """`ResidualBlock`, recomputed in the backward pass where `compute.remat` says so."""
    return nn.remat(ResidualBlock, prevent_cse=True) if compute.remat else ResidualBlock


class SpatialUpsample(nn.Module):
    """[B, T, H, W, C] -> [B, T, 2H, 2W, C]: convolution to 4C, channels in the order (c, row, column)."""

    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, frames, height, width, channels = x.shape
        y = CausalConv(4 * channels, compute=self.compute, name="conv")(x)
        y = y.reshape(batch, frames, height, width, channels, 2, 2).transpose(0, 1, 2, 5, 3, 6, 4)
        return y.reshape(batch, frames, 2 * height, 2 * width, channels)


class TemporalUpsample(nn.Module):
    """[B, T, H, W, C] -> [B, 2T - 1, H, W, C]: convolution to 2C, channels in the order (c, time).

    The first frame of the clip is dropped; a chunk that continues a clip gives 2T frames.
    """

    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, frames, height, width, channels = x.shape
        conv = CausalConv(2 * channels, compute=self.compute, name="conv")
        continues = conv.has_variable(CONTEXT, "frames")
        y = conv(x).reshape(batch, frames, height, width, channels, 2).transpose(0, 1, 5, 2, 3, 4)
        y = y.reshape(batch, 2 * frames, height, width, channels)
        return y if continues else y[:, 1:]
