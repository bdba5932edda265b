"""Frames and a file of prompts for the tests of VBench."""

import json

import numpy as np


def clip():
    """Four frames without any symmetry, uint8 [4, 24, 32, 3]."""
    t, y, x, c = np.meshgrid(np.arange(4), np.arange(24), np.arange(32), np.arange(3), indexing="ij")
    return ((7 * t * y + 5 * x * (c + 1) + 11 * t * c + y * x) % 256).astype(np.uint8)


def full_info(folder):
    """A file in the format of VBench's, where a prompt comes twice, as in VBench's own."""
    entries = [
        {"prompt_en": "a red circle", "dimension": ["temporal_flickering"]},
        {
            "prompt_en": "a cat, by Hokusai",
            "dimension": ["appearance_style"],
            "auxiliary_info": {"appearance_style": {}},
        },
        {
            "prompt_en": "a red circle",
            "dimension": ["color", "temporal_flickering"],
            "auxiliary_info": {"color": "red"},
        },
        {"prompt_en": "ünïcode ", "dimension": ["scene"]},
    ]
    path = folder / "VBench_full_info.json"
    path.write_text(json.dumps(entries))
    return path
