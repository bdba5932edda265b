"""Distillation 2: the tiny decoder behind the frozen encoder (paper, section on the asymmetric decoder).

    python -m experiments.prepare --toy-world 2048 --model experiments/models/toy_teacher --output runs/latents
    python -m experiments.train --config experiments/configs/decoder.py:tiny --workdir runs/decoder \
        --config.model.folder=experiments/models/toy_teacher/causal_video_vae \
        --config.data.latents=runs/latents --config.data.toy_clips=2048
    python -m converters.export_torch --checkpoint runs/decoder --output runs/decoder_model

Both variants need
           --config.model.folder=...   causal_video_vae folder whose encoder stays

tiny   2 CPU cores, minutes: the toy world, a student with a tenth of the parameters of the toy teacher's own decoder,
       and the gradient and SSIM distance in the place of LPIPS, whose weights are no part of the repository.
full   The released sizes, bfloat16, cut-outs of 17 x 256 x 256 of videos. Needs
           --config.data.videos=...    folder of videos
           --config.data.captions=...  their captions (they select the videos; nothing here reads a caption)
           --config.model.lpips=...    folder of python -m converters.import_lpips
       and may have
           --config.model.taehv=...    a TAEHV .safetensors file to grow from
           --config.data.latents=...   latents of these videos (experiments.prepare), so that no encoder runs
       The paper gives neither steps, batch nor learning rate; ours are those of public trainings of such decoders.

`loss.adversarial_weight` above 0 trains a patch discriminator along; the paper has none.
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "tiny") -> ConfigDict:
    """Config of a variant: "tiny" or "full"."""
    return choose_variant("decoder.py", variant, {"tiny": _tiny, "full": _full})


def _base() -> ConfigDict:
    whole = {"video_frames": 0, "height": 0, "width": 0}
    config = base_config(
        "decoder",
        "clips",
        model={
            "folder": "",
            "taehv": "",
            "lpips": "",
            # Also measures the folder's own decoder on the held-out clips.
            "evaluate_native": True,
            "decoder": {
                "num_features": (256, 128, 64, 64),
                "time_upscale": (True, True, True),
                "space_upscale": (True, True, True),
            },
            "discriminator": {"widths": (64, 128, 256)},
        },
        loss={
            "mse_weight": 1.0,
            "perceptual": "lpips",
            "perceptual_weight": 1.0,
            "scales": 3,
            "adversarial_weight": 0.0,
        },
        data={
            # The toy world of this many clips, or else a folder of videos; with cached latents of them, or without.
            "toy_clips": 0,
            "videos": "",
            "captions": "",
            "latents": "",
            "clips_per_video": 0,
            "frame_rate": 24.0,
            "video_frames": 49,
            "height": 320,
            "width": 512,
            # Random cut-outs; 0 is the whole side.
            "crop": dict(whole),
            "eval_crop": dict(whole),
            "eval_fraction": 0.01,
        },
    )
    config.checkpoint = {"every": 1000, "keep": 3, "best_metric": "eval/psnr_db"}
    return config


def _tiny() -> ConfigDict:
    config = _base()
    config.update({"num_steps": 2400, "batch_size": 16, "log_every": 25, "eval_every": 200})
    config.checkpoint.every = 200
    config.model.decoder.num_features = (14, 10, 8, 8)
    config.model.discriminator.widths = (8, 16, 32)
    config.loss.update({"perceptual": "gradient_ssim", "perceptual_weight": 0.01, "scales": 2})
    # Muon is faster with some seeds, and with others never finds the colours (docs/decoder.md).
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 50})
    config.data.update({"toy_clips": 4096, "video_frames": 17, "height": 64, "width": 64, "eval_fraction": 0.03})
    # With cached latents alone: the norms of the encoder take their moments from whole frames.
    config.data.crop.update({"height": 32, "width": 32})
    return config


def _full() -> ConfigDict:
    config = _base()
    config.update({"num_steps": 100_000, "batch_size": 64, "log_every": 10, "eval_every": 1000})
    config.dtype = "bfloat16"
    config.ema_decay = 0.999
    config.data.crop = {"video_frames": 17, "height": 256, "width": 256}
    config.data.eval_crop = {"video_frames": 17, "height": 256, "width": 256}
    # Ten million weights are not worth splitting: XLA then gathers activations, 103 GB in a step.
    config.mesh.data, config.mesh.fsdp = -1, 1
    return config
