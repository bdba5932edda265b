"""Positions of the video transformer, on the host in numpy: a fixed table over space, a rotation over time.

Along one axis of a table of n places, with D the model width and b the base size (`sample_size / patch_size`):

    a(i)     = [sin(w p_i), cos(w p_i)],  p_i = i b / n,  w_k = 10000^(-4k/D),  k = 0 .. D/4 - 1          (1)
    P(y, x)  = [a(x), a(y)]                                                                               (2)
    theta_k  = t 10000^(-2k/K),  k = 0 .. K/2 - 1;  channels (2k, 2k + 1) turn by theta_k                 (3)

(2) is separable, and a bilinear step keeps a function of one axis a function of that axis. So windows are cut and
resized on the one-axis table (1); the full table exists only in checkpoints, as the buffer `pos_embed.pos_embed`.
Agrees with `PatchEmbed3D` and `temp_rope_embed` of the public code.
"""

from typing import Protocol

import numpy as np

from nd_jax.errors import UserError

THETA = 10000.0


class TableSizes(Protocol):
    """What of a model's config shapes the table."""

    sample_size: int
    patch_size: int
    pos_embed_max_size: int

    @property
    def inner_dim(self) -> int: ...


def axis_table(sizes: TableSizes) -> np.ndarray:
    """Equation 1: float64 [pos_embed_max_size, inner_dim / 2]."""
    places, quarter = sizes.pos_embed_max_size, sizes.inner_dim // 4
    base = sizes.sample_size // sizes.patch_size
    # Positions are float32 in the public code, everything behind them float64.
    position = (np.arange(places, dtype=np.float32) / np.float32(places / base)).astype(np.float64)
    angle = position[:, None] * THETA ** (-np.arange(quarter, dtype=np.float64) / quarter)[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _outer(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Equation 2 over a grid, rows outside: [h, D/2], [w, D/2] -> float32 [h * w, D]."""
    h, w = len(rows), len(columns)
    grid = np.empty((h, w, 2 * rows.shape[1]), np.float32)
    grid[..., : rows.shape[1]] = columns[None]
    grid[..., rows.shape[1] :] = rows[:, None]
    return grid.reshape(h * w, -1)


def position_table(sizes: TableSizes) -> np.ndarray:
    """The whole table as checkpoints hold it: float32 [1, pos_embed_max_size^2, inner_dim]."""
    table = axis_table(sizes)
    return _outer(table, table)[None]


def position_window(sizes: TableSizes, size: tuple[int, int], window: tuple[int, int]) -> np.ndarray:
    """Spatial positions of one frame.

    Args:
      sizes: the model's config.
      size: (height, width) of the frame in latent pixels.
      window: (height, width) of the current clip in latent pixels: the part of the table's centre that the frame
        covers, resized to `size` in one bilinear step without antialiasing where the two differ.

    Returns:
      float32 [height / patch * width / patch, inner_dim], rows of the frame outside.

    Raises:
      UserError: the window is larger than the table.
    """
    table, patch = axis_table(sizes), sizes.patch_size
    rows, columns = (
        _resized(_centre(table, extent // patch, window), places // patch)
        for places, extent in zip(size, window, strict=True)
    )
    return _outer(rows, columns)


def _centre(table: np.ndarray, length: int, window: tuple[int, int]) -> np.ndarray:
    if length > len(table):
        raise UserError(
            f"a clip of {window[0]} x {window[1]} latent pixels needs {length} positions along an axis and the model's "
            f"table has {len(table)}: generate smaller frames or set pos_embed_max_size higher before training"
        )
    start = (len(table) - length) // 2
    return table[start : start + length]


def _resized(table: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation along axis 0 with pixel centres at half integers (align_corners false, no antialiasing)."""
    source = np.maximum((np.arange(length) + 0.5) * (len(table) / length) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), len(table) - 1)
    high = np.minimum(low + 1, len(table) - 1)
    weight = (source - low)[:, None]
    return (1.0 - weight) * table[low] + weight * table[high]


def rotary_table(time_ids: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Equation 3: integers [...] -> (cos, sin), float32 [..., head_dim / 2]."""
    frequency = THETA ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.multiply.outer(np.asarray(time_ids, np.float64), frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
