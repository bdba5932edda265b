"""Convolutions on enlarged pictures, moved in front of the enlargement: exact rewrites of their kernels.

With n2 the nearest 2x, d2s DepthToSpace of 2 x 2 (its input channels are (row a, column b, channel)), G a 1x1
convolution, and K a 3x3 convolution with zeros around the picture:

    K . G        = K',              K'[d, e] = G K[d, e]                                             (1)
    K . n2       = d2s . S,         S[u, v]_(a, b) = sum_(d, e) [u = (a + d) // 2] [v = (b + e) // 2] K[d, e]      (2)
    K . d2s      = d2s . R,         R[u, v]_(p, q)(a, b) = sum_(d, e) [2u + p = a + d] [2v + q = b + e] K[d, e]    (3)
    f . d2s      = d2s . f,         f elementwise                                                    (4)

Row 2i + a of the enlarged picture lies in row i of the small one, so that tap d of the kernel falls on row i + u there;
the zeros around the two pictures coincide. S does the work of K on a quarter of the pixels with four times the
channels, and no enlarged picture with many channels is ever written.
"""

import numpy as np

# [d + 1, u + 1, a]: whether tap d of row 2i + a falls on row i + u.
_FALLS_ON = np.array([[[u == (a + d) // 2 for a in (0, 1)] for u in (-1, 0, 1)] for d in (-1, 0, 1)], np.float64)
# [d + 1, u + 1, p, a]: whether it falls on row p of the two that row i + u becomes.
_FALLS_ON_HALF = np.array(
    [[[[2 * u + p == a + d for a in (0, 1)] for p in (0, 1)] for u in (-1, 0, 1)] for d in (-1, 0, 1)], np.float64
)


def behind_pointwise(kernel: np.ndarray, pointwise: np.ndarray) -> np.ndarray:
    """Equation 1: kernel [3, 3, G, O] and 1x1 kernel [1, 1, C, G] -> float32 [3, 3, C, O]."""
    return np.einsum("cg,dego->deco", pointwise[0, 0].astype(np.float64), kernel).astype(np.float32)


def behind_nearest(kernel: np.ndarray) -> np.ndarray:
    """S of equation 2: kernel [3, 3, C, O] -> float32 [3, 3, C, 4 O]."""
    taps = np.einsum("dua,evb,deco->uvcabo", _FALLS_ON, _FALLS_ON, kernel.astype(np.float64))
    return taps.reshape(*taps.shape[:3], -1).astype(np.float32)


def behind_depth_to_space(kernel: np.ndarray) -> np.ndarray:
    """R of equation 3: kernel [3, 3, C, O] -> float32 [3, 3, 4 C, 4 O]."""
    taps = np.einsum("dupa,evqb,deco->uvpqcabo", _FALLS_ON_HALF, _FALLS_ON_HALF, kernel.astype(np.float64))
    return taps.reshape(3, 3, 4 * kernel.shape[2], 4 * kernel.shape[3]).astype(np.float32)
