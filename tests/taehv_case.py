"""A TAEHV checkpoint for tests: the public file's keys and shapes, random numbers."""

import numpy as np
from safetensors.numpy import save_file


def taehv_file(path, latent_channels, widths, doubles=(False, True, True), seed=0):
    """Writes the decoder, and a tensor of the encoder that nobody reads; returns the tensors."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)
    tensors = {
        "encoder.0.weight": draw(4, 3, 3, 3),
        "decoder.1.weight": draw(widths[0], latent_channels, 3, 3),
        "decoder.1.bias": draw(widths[0]),
    }
    for group in range(3):
        width, place = widths[group], 3 + 6 * group
        for block in range(3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                tensors[f"decoder.{place + block}.conv.{layer}.weight"] = draw(width, inputs, 3, 3)
                tensors[f"decoder.{place + block}.conv.{layer}.bias"] = draw(width)
        tensors[f"decoder.{place + 4}.conv.weight"] = draw(width * (2 if doubles[group] else 1), width, 1, 1)
        tensors[f"decoder.{place + 5}.weight"] = draw(widths[group + 1], width, 3, 3)
    tensors |= {"decoder.22.weight": draw(3, widths[3], 3, 3), "decoder.22.bias": draw(3)}
    save_file(tensors, path)
    return tensors
