"""The causal video VAE, before the teacher that is trained on its latents.

    python -m experiments.train --config experiments/configs/video_vae.py:tiny-frames --workdir runs/frames
    python -m converters.export_torch --checkpoint runs/frames --output runs/frames_model
    python -m experiments.train --config experiments/configs/video_vae.py:tiny --workdir runs/video_vae \
        --config.model.folder=runs/frames_model/causal_video_vae
    python -m converters.export_torch --checkpoint runs/video_vae --output runs/vae_model
    python -m experiments.prepare --toy-world 4096 --model runs/vae_model --output runs/latents --update-normalization

tiny   2 CPU cores, minutes: the toy world, first single frames (`tiny-frames`), which cost a sixth and teach all there
       is to see in a picture, then clips of 9 frames that start from them (`model.inflate`).
full   Pyramid-Flow's sizes on videos, bfloat16, cut-outs of 17 x 256 x 256. Needs
           --config.data.videos=...    folder of videos
           --config.data.captions=...  their captions (they select the videos; nothing here reads a caption)
       and may start from weights:
           --config.model.folder=...   CausalVideoVAE in the released layout
       The learning rate is that of public trainings; the number of steps is our guess. There is no perceptual and no
       adversarial loss, see nd_jax/distill/video_vae.py.

`latent_shift` and `latent_scale` are known only when the VAE is trained: `experiments.prepare --update-normalization`
measures them and writes them into the model folder.
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "tiny") -> ConfigDict:
    """Config of a variant: "tiny-frames", "tiny" or "full"."""
    variants = {"tiny-frames": _tiny_frames, "tiny": _tiny, "full": _full}
    return choose_variant("video_vae.py", variant, variants)


def _base() -> ConfigDict:
    whole = {"video_frames": 0, "height": 0, "width": 0}
    return base_config(
        "video_vae",
        "clips",
        remat=False,
        loss={
            "l1_weight": 1.0,
            "mse_weight": 0.0,
            "gradient_weight": 0.0,
            "gradient_scales": 3,
            "kl_weight": 1e-6,
        },
        data={
            # The toy world of this many clips, or else a folder of videos.
            "toy_clips": 0,
            "videos": "",
            "captions": "",
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


def _sizes(widths: tuple, encoder_layers: tuple, decoder_layers: tuple, groups: int, normalisation: tuple) -> dict:
    """Both halves of a `CausalVideoVAE` that makes 8 x 8 x 8 values one; (shift, scale) pairs of its latents."""
    halves = (True, True, True, False)
    shift, scale = normalisation
    return {
        "encoder_out_channels": 16,
        "encoder_layers_per_block": encoder_layers,
        "encoder_block_out_channels": widths,
        "encoder_spatial_down_sample": halves,
        "encoder_temporal_down_sample": halves,
        "encoder_norm_num_groups": groups,
        "decoder_in_channels": 16,
        "decoder_layers_per_block": decoder_layers,
        "decoder_block_out_channels": widths,
        "decoder_spatial_up_sample": halves,
        "decoder_temporal_up_sample": halves,
        "decoder_norm_num_groups": groups,
        "latent_shift": shift,
        "latent_scale": scale,
    }


def _tiny() -> ConfigDict:
    config = _base()
    config.update(
        {
            "num_steps": 800,
            "batch_size": 4,
            "log_every": 25,
            "eval_every": 200,
            "checkpoint": {"every": 200, "keep": 2, "best_metric": "eval/psnr_db"},
            "model": {
                "folder": "",
                "inflate": True,
                "initial_logvar": -6.0,
                "vae": _sizes((8, 16, 24, 28), (1, 1, 1, 1), (1, 1, 1, 1), 4, ((0.0, 0.0), (1.0, 1.0))),
            },
        }
    )
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    # The background is most of a clip, and its colour is what minimises L1 and edges for a long time.
    config.loss.l1_weight = 0.0
    config.loss.mse_weight = 1.0
    config.loss.kl_weight = 1e-5
    config.data.update({"toy_clips": 4096, "video_frames": 17, "height": 64, "width": 64})
    # Whole frames: norms take their moments from a frame, and in cut-outs these are others.
    config.data.crop.video_frames = 9
    config.data.eval_fraction = 0.016
    return config


def _tiny_frames() -> ConfigDict:
    config = _tiny()
    config.num_steps = 1200
    config.batch_size = 16
    config.optimizer.learning_rate = 6e-3
    config.data.crop.video_frames = 1
    config.data.eval_crop.video_frames = 1
    return config


def _full() -> ConfigDict:
    config = _base()
    config.update(
        {
            "num_steps": 100_000,
            "batch_size": 64,
            "log_every": 10,
            "eval_every": 1000,
            "checkpoint": {"every": 1000, "keep": 3, "best_metric": "eval/psnr_db"},
            "model": {
                "folder": "",
                "inflate": False,
                "initial_logvar": 0.0,
                "vae": _sizes(
                    (128, 256, 512, 512),
                    (2, 2, 2, 2),
                    (3, 3, 3, 3),
                    32,
                    ((0.1490, -0.2343), (1 / 1.8415, 1 / 3.0986)),
                ),
            },
        }
    )
    config.dtype = "bfloat16"
    config.remat = True
    config.ema_decay = 0.999
    config.data.crop = {"video_frames": 17, "height": 256, "width": 256}
    config.data.eval_crop = {"video_frames": 17, "height": 256, "width": 256}
    # Weights of 0.3 billion values: beyond 16 shards they are copied, as in the other full configs.
    config.mesh.data, config.mesh.fsdp = -1, 16
    return config
