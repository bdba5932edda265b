"""Numbers that several conversion steps agree on."""

import numpy as np

FP16_MAX = float(np.finfo(np.float16).max)  # 65504


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """Signal-to-noise ratio 20 log10(|ref| / |ref - got|) in dB, 2-norms in float64.

    `inf` when the arrays are equal, `nan` when a value is not finite.
    """
    reference, got = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(20 * np.log10(np.linalg.norm(reference) / np.linalg.norm(reference - got)))
