"""Rounding of weights that makes up for its own errors on the layer's real inputs (GPTQ, arXiv:2210.17323).

Nearest rounding is best for a layer whose inputs are uncorrelated. Pixels and channels of a decoder are not: what the
rounding of one weight does to the output, the weights not yet rounded can undo in part. For one output channel w with
inputs x (a patch of the picture), weights are rounded one after the other so that

    E = (w - q)^T H (w - q),   H = mean x x^T + damping                                             (1)

stays small: with U upper triangular and H^-1 = U^T U, after rounding weight k

    e_k = (w_k - q_k) / U_kk;   w_j <- w_j - e_k U_kj   for j > k                                    (2)

Inputs are taken in the order of falling mean square, so that the large ones are rounded while many can follow.
"""

import numpy as np

# Share of H's mean diagonal that is added to it; inputs that never vary would make it singular.
DAMPING = 0.01
BLOCK = 128


def channel_scales(weight_ON: np.ndarray, levels: int = 127) -> np.ndarray:
    """Symmetric step of every output channel: float32 [O], largest weight on the largest level."""
    largest = np.abs(weight_ON).max(axis=1)
    return (np.maximum(largest, np.finfo(np.float32).tiny * levels) / levels).astype(np.float32)


def round_with_compensation(
    weight_ON: np.ndarray, moments_NN: np.ndarray, scales_O: np.ndarray, levels: int = 127
) -> np.ndarray:
    """Equations 1 and 2: the numbers, multiples of their channel's step, that stand for the weights.

    Args:
      weight_ON: one row per output channel.
      moments_NN: mean x x^T over the layer's inputs x, ordered like a row.
      scales_O: step of every channel.
      levels: largest multiple.

    Returns:
      float32 [O, N].
    """
    order = np.argsort(-np.diag(moments_NN), kind="stable")
    h = moments_NN[np.ix_(order, order)].astype(np.float64)
    h[np.diag_indices_from(h)] += max(DAMPING * float(np.mean(np.diag(h))), 1e-12)
    upper = _inverse_root(h)
    w, scale = weight_ON[:, order].astype(np.float64), scales_O.astype(np.float64)
    q = np.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, w.shape[1]))
        errors = np.empty((w.shape[0], block.stop - start))
        for k in range(start, block.stop):
            q[:, k] = np.clip(np.round(w[:, k] / scale), -levels, levels) * scale
            errors[:, k - start] = (w[:, k] - q[:, k]) / upper[k, k]
            w[:, k + 1 : block.stop] -= np.outer(errors[:, k - start], upper[k, k + 1 : block.stop])
        w[:, block.stop :] -= errors @ upper[block, block.stop :]
    restored = np.empty(w.shape, np.float32)
    restored[:, order] = q
    return restored


def _inverse_root(h: np.ndarray) -> np.ndarray:
    """The upper triangle U with H^-1 = U^T U: the inverse of R in H = R R^T, a Cholesky factor from the other end."""
    from scipy.linalg.lapack import dtrtri

    root, _ = dtrtri(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1], lower=0)
    return root


def patch_moments(pictures: np.ndarray, size: tuple[int, int], pads: tuple[int, int], limit: int, rng) -> np.ndarray:
    """Sum of x x^T over the patches x of a convolution with stride 1, and their number in the last place.

    Args:
      pictures: [B, C, H, W].
      size: of the kernel.
      pads: zeros in front of rows and columns; as many behind.
      limit: patches at most, drawn at random.
      rng: numpy generator.

    Returns:
      (float64 [N, N] with N = C rows columns in a kernel's order, number of patches).
    """
    padded = np.pad(pictures, ((0, 0), (0, 0), (pads[0],) * 2, (pads[1],) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size, axis=(2, 3))  # [B, C, H', W', kh, kw]
    batch, _, height, width = windows.shape[:4]
    count = batch * height * width
    places = rng.choice(count, limit, replace=False) if count > limit else np.arange(count)
    b, y, x = np.unravel_index(places, (batch, height, width))
    patches = windows[b, :, y, x].reshape(len(places), -1).astype(np.float32)
    return (patches.T @ patches).astype(np.float64), len(places)
