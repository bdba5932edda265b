"""Rounding of weights that makes up for its own errors on the layer's real inputs (GPTQ, arXiv:2210.17323).

Nearest rounding is best for a layer whose inputs are uncorrelated. Pixels and channels of a decoder are not: what the
rounding of one weight does to the output, the weights not yet rounded can undo in part. For one output channel w with
inputs x (a patch of the picture, a token), weights are rounded one after the other so that

    E = (w - q)^T H (w - q),   H = mean x x^T + damping                                             (1)

stays small: with U upper triangular and H^-1 = U^T U, after rounding weight k

    e_k = (w_k - q_k) / U_kk;   w_j <- w_j - e_k U_kj   for j > k                                    (2)

Inputs are taken in the order of falling mean square, so that the large ones are rounded while many can follow.
"""

from typing import NamedTuple

import numpy as np

# Share of H's mean diagonal that is added to it; inputs that never vary would make it singular.
DAMPING = 0.01
BLOCK = 128


class Compensation(NamedTuple):
    """What equation 2 needs to know of a layer's inputs: the order to take them in, int [N], and U, float64 [N, N]."""

    order: np.ndarray
    upper: np.ndarray


def channel_scales(weight_ON: np.ndarray, levels: int = 127) -> np.ndarray:
    """Symmetric step of every output channel: float32 [O], largest weight on the largest level."""
    largest = np.abs(weight_ON).max(axis=1)
    return (np.maximum(largest, np.finfo(np.float32).tiny * levels) / levels).astype(np.float32)


def compensation(moments_NN: np.ndarray) -> Compensation:
    """For `round_rows`, of mean x x^T over the layer's inputs x, ordered like a row of weights."""
    order = np.argsort(-np.diag(moments_NN), kind="stable")
    h = moments_NN[np.ix_(order, order)].astype(np.float64)
    h[np.diag_indices_from(h)] += max(DAMPING * float(np.mean(np.diag(h))), 1e-12)
    return Compensation(order, _inverse_root(h))


def round_rows(weight_ON: np.ndarray, made: Compensation, scales_O: np.ndarray, levels: int = 127) -> np.ndarray:
    """Equations 1 and 2: the numbers, multiples of their channel's step, that stand for the weights.

    Args:
      weight_ON: one row per output channel.
      made: of the layer's inputs.
      scales_O: step of every channel.
      levels: largest multiple.

    Returns:
      The multiples, int8 [O, N].
    """
    order, upper = made
    w, scale = weight_ON[:, order].astype(np.float64), scales_O.astype(np.float64)
    steps = np.empty(w.shape, np.int8)
    for start in range(0, w.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, w.shape[1]))
        errors = np.empty((w.shape[0], block.stop - start))
        for k in range(start, block.stop):
            q = np.clip(np.round(w[:, k] / scale), -levels, levels)
            steps[:, k] = q
            errors[:, k - start] = (w[:, k] - q * scale) / upper[k, k]
            w[:, k + 1 : block.stop] -= np.outer(errors[:, k - start], upper[k, k + 1 : block.stop])
        w[:, block.stop :] -= errors @ upper[block, block.stop :]
    restored = np.empty_like(steps)
    restored[:, order] = steps
    return restored


def _inverse_root(h: np.ndarray) -> np.ndarray:
    """The upper triangle U with H^-1 = U^T U: the inverse of R in H = R R^T, a Cholesky factor from the other end."""
    from scipy.linalg.lapack import dtrtri

    root, _ = dtrtri(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1], lower=0)
    return root


def row_moments(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Sum of x x^T over the rows of [..., N]: float32 [N, N], and their number."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows, len(rows)


def patch_moments(
    pictures: np.ndarray, size: tuple[int, int], strides: tuple[int, int], pads: tuple[int, ...], limit: int, rng
) -> tuple[np.ndarray, int]:
    """Sum of x x^T over the patches x of a convolution, and their number.

    Args:
      pictures: [B, C, H, W].
      size: of the kernel.
      strides: rows and columns from patch to patch.
      pads: zeros at top, left, bottom and right.
      limit: patches at most, drawn at random.
      rng: numpy generator.

    Returns:
      (float32 [N, N] with N = C rows columns in a kernel's order, number of patches).
    """
    top, left, bottom, right = pads
    padded = np.pad(pictures, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))  # [B, C, H', W', kh, kw]
    windows = windows[:, :, :: strides[0], :: strides[1]]
    batch, _, height, width = windows.shape[:4]
    count = batch * height * width
    places = rng.choice(count, limit, replace=False) if count > limit else np.arange(count)
    b, y, x = np.unravel_index(places, (batch, height, width))
    return row_moments(windows[b, :, y, x].reshape(len(places), -1).astype(np.float32))
