"""QuickSRNet, which doubles the sides of the decoder's frames (paper, last stage of the pipeline).

    python -m experiments.train --config experiments/configs/super_resolution.py:tiny --workdir runs/super_resolution
    python -m converters.export_torch --checkpoint runs/super_resolution --output runs/super_resolution_model

tiny   2 CPU cores, a minute or two: the small network, 2x, on the first frames of the toy world.
full   The medium network, 2x, on cut-outs of 192 x 192 of videos. Needs
           --config.data.videos=...    folder of videos, of 640 x 1024 pixels or more
           --config.data.captions=...  their captions (they select the videos; nothing here reads a caption)
       The paper says "QuickSRNet 2x" and fewer than 0.1M parameters, which small and medium have. Steps, batch and
       learning rate are our guess.

Both may start from weights, whose sizes then count instead of `variant` and `scaling_factor`:
           --config.model.folder=...   quicksrnet folder
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "tiny") -> ConfigDict:
    """Config of a variant: "tiny" or "full"."""
    return choose_variant("super_resolution.py", variant, {"tiny": _tiny, "full": _full})


def _base() -> ConfigDict:
    config = base_config(
        "super_resolution",
        "clips",
        # "small", "medium" or "large"; 2, 3 or 4.
        model={"folder": "", "variant": "small", "scaling_factor": 2},
        data={
            # The toy world of this many clips, or else a folder of videos.
            "toy_clips": 0,
            "videos": "",
            "captions": "",
            "clips_per_video": 0,
            # Clips of one frame each, this many a second.
            "frame_rate": 1.0,
            "video_frames": 1,
            "height": 640,
            "width": 1024,
            # Random cut-outs of the large frames; 0 is the whole side.
            "crop": {"video_frames": 1, "height": 0, "width": 0},
            "eval_crop": {"video_frames": 1, "height": 0, "width": 0},
            # Turns cut-outs over at random in training.
            "flips": True,
            "eval_fraction": 0.01,
        },
    )
    config.optimizer.update({"name": "adam", "beta2": 0.999})
    config.checkpoint = {"every": 1000, "keep": 3, "best_metric": "eval/psnr_db"}
    return config


def _tiny() -> ConfigDict:
    config = _base()
    config.update({"num_steps": 1500, "batch_size": 16, "log_every": 25, "eval_every": 500})
    config.checkpoint.every = 500
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50})
    config.data.update({"toy_clips": 4096, "height": 64, "width": 64, "eval_fraction": 0.03})
    config.data.crop.update({"height": 32, "width": 32})
    return config


def _full() -> ConfigDict:
    config = _base()
    config.update({"num_steps": 500_000, "batch_size": 32, "log_every": 100, "eval_every": 5000})
    config.checkpoint.every = 5000
    config.model.variant = "medium"
    config.ema_decay = 0.999
    config.optimizer.learning_rate = 5e-4
    config.data.crop.update({"height": 192, "width": 192})
    config.mesh.data, config.mesh.fsdp = -1, 1
    return config
