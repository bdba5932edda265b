"""A model folder of random weights in the released layout: for tests, measurements and trying out a machine.

    python -m experiments.random_model --output random_model [--components ssd_1b_vae,quicksrnet]
    python -m experiments.generate --model random_model --prompts prompts.txt --output videos

`full` has the released sizes of Neodragon (DistilT5 and ContextAdapter, both CLIPs, 18 blocks, the asymmetric VAE, and
SSD-1B with its CLIPs and image autoencoder), 4.9 billion parameters, in bfloat16, and QuickSRNet's medium network,
which the released folder does not have. `teacher` has those of Pyramid-Flow (T5 v1.1 XXL, 24 blocks with a context
embedder, native decoder; no first frame, no super-resolution), 7.9 billion parameters. `tiny` and `tiny-teacher` are of
the same kinds with some ten thousand. The tokenizers are small ones, built from the toy world's captions.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError, run_command

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
FIRST_FRAME_TOKENIZERS = ("ssd_1b_tokenizer", "ssd_1b_tokenizer_2")
SIZES = ("full", "teacher", "tiny", "tiny-teacher")
VOCABULARY = 128
RUN_VALUES = 1 << 22  # drawn in float32 at a time


def component_configs(size: str) -> tuple[dict[str, tuple[Any, Any]], dict[str, Any]]:
    """(subfolder -> (network, config), entries of generation.json) of one of `SIZES`."""
    from nd_jax.models.autoencoder_kl import AutoencoderKLConfig
    from nd_jax.models.clip_text import CLIP_G, CLIP_L, CLIPTextConfig
    from nd_jax.models.context_adapter import ContextAdapterConfig
    from nd_jax.models.mmdit import MMDiTConfig
    from nd_jax.models.quicksrnet import QuickSRNetConfig, variant_config
    from nd_jax.models.t5 import T5_XXL, DistilT5Config, T5Config
    from nd_jax.models.unet import UNetConfig
    from nd_jax.models.video_vae import AsymmetricVideoVAEConfig, CausalVideoVAEConfig
    from nd_jax.weights import mmdit, networks, vae

    teacher = size in ("teacher", "tiny-teacher")
    if size in ("full", "teacher"):
        clips, t5, adapter = (CLIP_L, CLIP_G), DistilT5Config(), ContextAdapterConfig()
        transformer, video_vae, settings = MMDiTConfig(), AsymmetricVideoVAEConfig(), {}
        if teacher:
            t5, settings = DistilT5Config(T5_XXL), {"mode": "monolithic"}
            transformer, video_vae = MMDiTConfig(num_layers=24, context_embedder=True), CausalVideoVAEConfig()
        unet, image_vae, large = UNetConfig(), AutoencoderKLConfig(), variant_config("medium", 2)
    else:
        clip = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, eos_token_id=1)
        clips = (CLIPTextConfig(**clip, num_attention_heads=2, max_position_embeddings=16, projection_dim=8),) * 2
        encoder = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
        t5, adapter = DistilT5Config(encoder, 16), ContextAdapterConfig(16, 16, (16, 16), (True, True))
        transformer = MMDiTConfig(
            sample_size=16,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
            context_embedder=teacher,
        )
        coder = dict(
            encoder_out_channels=4,
            encoder_block_out_channels=(8,) * 4,
            encoder_layers_per_block=(1,) * 4,
            encoder_norm_num_groups=4,
        )
        decoder = dict(
            decoder_in_channels=4,
            decoder_block_out_channels=(8,) * 4,
            decoder_layers_per_block=(1,) * 4,
            decoder_norm_num_groups=4,
        )
        tiny = AsymmetricVideoVAEConfig(**coder, decoder_num_features=(8,) * 4)
        video_vae = CausalVideoVAEConfig(**coder, **decoder) if teacher else tiny
        unet = UNetConfig(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=32,
            transformer_layers_per_block=(1, (1,)),
            reverse_transformer_layers_per_block=((1, 2), 1),
            attention_head_dim=2,
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        )
        image_vae = AutoencoderKLConfig(block_out_channels=(8,) * 3, layers_per_block=1, norm_num_groups=4)
        large = QuickSRNetConfig(num_channels=8, num_intermediate_layers=1)
        settings = dict(height=64, width=64, video_frames=9, frame_rate=8, text_length=16)
        if teacher:
            settings |= dict(mode="monolithic", first_steps=[2, 1, 1], steps=[1, 1, 1], guidance=[3, 2])
    parts = {
        "text_encoder": (networks.CLIP_TEXT, clips[0]),
        "text_encoder_2": (networks.CLIP_TEXT, clips[1]),
        "text_encoder_3": (networks.DISTIL_T5, t5),
        "context_adapter": (networks.CONTEXT_ADAPTER, adapter),
        "diffusion_transformer_320p": (mmdit.PYRAMID_MMDIT, transformer),
        "causal_video_vae": (vae.ASYMMETRIC_VIDEO_VAE, video_vae),
        "ssd_1b_text_encoder": (networks.CLIP_TEXT_MODEL, dataclasses.replace(clips[0], projection_dim=None)),
        "ssd_1b_text_encoder_2": (networks.CLIP_TEXT, clips[1]),
        "ssd_1b_unet": (networks.UNET, unet),
        "ssd_1b_vae": (networks.AUTOENCODER_KL, image_vae),
        "quicksrnet": (networks.QUICKSRNET, large),
    }
    if teacher:
        for name in [name for name in parts if name.startswith(("ssd_1b_", "quicksrnet"))]:
            del parts[name]
        del parts["context_adapter"], parts["diffusion_transformer_320p"]
        parts["text_encoder_3"] = (networks.T5_ENCODER, t5.encoder)
        parts["diffusion_transformer_384p"] = (mmdit.PYRAMID_FLOW_MMDIT, transformer)
        parts["causal_video_vae"] = (vae.CAUSAL_VIDEO_VAE, video_vae)
    return parts, settings


def random_params(network: Any, config: Any, rng: np.random.Generator, dtype: Any) -> Mapping[str, Any]:
    """Numpy parameters under which activations keep their size: norm scales near 1, kernels N(0, 1 / fan in).

    T5 does not divide its logits by sqrt(d_kv), so its queries are as much smaller (as transformers initialises them).
    Otherwise each token attends to one other, and rounding in float32 alone costs a full-size T5 60 dB.
    """
    import jax

    from nd_jax.weights.networks import abstract_params

    query_size = getattr(getattr(config, "encoder", config), "d_kv", 1) ** -0.5

    def leaf(path: tuple, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        name, values, size = path[-1].key, np.empty(spec.shape, dtype), 0.1
        if name == "kernel":
            # Dense kernels may be stacked; those of convolutions are not.
            size = (spec.shape[-2] if len(spec.shape) < 4 else math.prod(spec.shape[:-1])) ** -0.5
            size *= query_size if path[-2].key == "query" else 1
        flat = values.reshape(-1)
        # A few at a time: the stacked kernels of T5 XXL alone would need 8 GB in float32.
        for start in range(0, flat.size, RUN_VALUES):
            noise = rng.standard_normal(min(RUN_VALUES, flat.size - start), np.float32)
            noise *= size
            if name == "scale":
                noise += 1
            flat[start : start + RUN_VALUES] = noise
        return values

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(network, config))


def write_random_model(
    folder: Path,
    size: str,
    seed: int = 0,
    dtype: Any = "bfloat16",
    components: Collection[str] | None = None,
) -> dict[str, int]:
    """Writes the folder, one component after another: subfolder -> number of parameters.

    Args:
      components: only these. The seed's numbers go to them in the order of the folder, so that a component's weights
        depend on which others are written.

    Raises:
      UserError: a component that the size does not have, a subfolder is there and is something else, or a full disk.
    """
    import jax
    import jax.numpy as jnp

    from nd_jax.data.tokenizers import build_unigram_tokenizer
    from nd_jax.data.toy_prompts import toy_prompts
    from nd_jax.files import write_text
    from nd_jax.generate.model_folder import GENERATION
    from nd_jax.weights.folder import save_component

    parts, settings = component_configs(size)
    unknown = sorted(set(components or ()) - set(parts))
    if unknown:
        raise UserError(f"--components {','.join(unknown)}: size {size} has only {', '.join(parts)}")
    if components is not None:
        parts = {name: part for name, part in parts.items() if name in components}
    rng, counts = np.random.default_rng(seed), {}
    for name, (network, config) in parts.items():
        params = random_params(network, config, rng, jnp.dtype(dtype))
        save_component(folder / name, network, config, params)
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(params))
        del params
    prompts = toy_prompts(512, seed=0)
    for name in (*TOKENIZERS, *(FIRST_FRAME_TOKENIZERS if "ssd_1b_unet" in parts else ())):
        if not (folder / name).exists():
            build_unigram_tokenizer(prompts, VOCABULARY, folder / name)
    if settings:
        write_text(folder / GENERATION, json.dumps(settings, indent=2) + "\n")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.random_model",
        description="Write a model folder of random weights in the released layout.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the model folder")
    parser.add_argument("--size", choices=SIZES, default="full", help="full: 10 GB, teacher: 16 GB (default full)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
    parser.add_argument("--components", metavar="A,B", help="only these, separated by commas (default all)")
    args = parser.parse_args(argv)
    components = args.components.split(",") if args.components else None
    counts = write_random_model(args.output, args.size, args.seed, components=components)
    summary = {"size": args.size, "seed": args.seed, "parameters": counts, "total": sum(counts.values())}
    from nd_jax.files import write_text

    write_text(args.output / "random_model.json", json.dumps(summary, indent=2) + "\n")
    print(f"{sum(counts.values()):,} random parameters in {len(counts)} components: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
