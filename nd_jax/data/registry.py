"""From a config (plain dictionary) to the batches of a method. One line per method."""

import dataclasses
import importlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from nd_jax.data.frames import FrameTransform
from nd_jax.data.latent_clips import LatentClips, LatentClipTransform
from nd_jax.data.latents import LatentSource, LatentTransform
from nd_jax.data.loader import Batches, EvalBatches, LoaderOptions
from nd_jax.data.prompts import PromptSource, PromptTransform, split_train_eval
from nd_jax.data.tokenizers import Tokenize, build_unigram_tokenizer, load_tokenizer
from nd_jax.data.toy_world import CLIP_FRAMES, ToyWorld
from nd_jax.data.videos import ClipTransform, VideoFolder
from nd_jax.errors import UserError
from nd_jax.files import new_folder

T5_TOKENIZER = "tokenizer_3"
CLIP_TOKENIZERS = ("tokenizer", "tokenizer_2")


def build_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    """(endless training batches, held-out batches) of this process."""
    build = DATA.get(config["method"]) or own_method(config["method"]).build_data
    return build(config, workdir)


def own_method(name: str) -> ModuleType:
    """The module of a method that has no line here: a name such as my_package.my_method is the module's.

    It has `resolve_config` and `build_method`, as in `nd_jax.distill.registry`, and `build_data`, as in `DATA`.

    Raises:
      UserError: there is no such module, or it lacks one of the three.
    """
    try:
        module = importlib.import_module(name) if all(map(str.isidentifier, name.split("."))) else None
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # The module is there, and what it imports is not.
        module = None
    if module is None:
        raise UserError(
            f"method is {name!r}: known methods are {', '.join(sorted(DATA))}; one of your own is named by its module, "
            "such as my_package.my_method, and Python has to find that (docs/extending.md)"
        )
    missing = [part for part in ("resolve_config", "build_method", "build_data") if not hasattr(module, part)]
    if missing:
        raise UserError(f"method is {name!r}, a module without {' and '.join(missing)} (docs/extending.md)")
    return module


def tokenizer_folders(config: Mapping[str, Any], workdir: Path) -> dict[str, Path]:
    """Name in a model folder -> folder of every tokenizer of a run: those that the config names, or those built into
    the workdir. They need not exist yet."""
    data = config["data"]
    if "tokenizer" in data:
        return {T5_TOKENIZER: Path(data["tokenizer"] or workdir / T5_TOKENIZER)}
    if "tokenizers" in data:
        return {name: Path(data["tokenizers"] or workdir) / name for name in (*CLIP_TOKENIZERS, T5_TOKENIZER)}
    return {}


def _prompt_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    data = config["data"]
    if not data["prompts"]:
        raise UserError(
            "config.data.prompts is empty: name a .txt, .jsonl or .array_record file, a folder or a pattern"
        )
    source = PromptSource(data["prompts"], data["prompt_key"], data["skip_bad"])
    if source.num_skipped and jax.process_index() == 0:
        print(f"left out {source.num_skipped} malformed prompts, first {source.first_skipped}", flush=True)
    train, held_out = split_train_eval(len(source), data["eval_fraction"], config["seed"])
    folders = tokenizer_folders(config, workdir)
    if not data["tokenizer"]:
        _build_tokenizers((source[int(i)] for i in train), data["tokenizer_vocab"], folders)
    tokenizer = _load_tokenizer(folders[T5_TOKENIZER], config["student"]["encoder"]["vocab_size"])
    tokenize = Tokenize(tokenizer, data["max_length"])
    options = _options(config)
    return (
        Batches(source, PromptTransform(tokenize, data["caption_dropout"]), options, train),
        EvalBatches(source, PromptTransform(tokenize), options, held_out),
    )


def _latent_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    data = config["data"]
    source = LatentSource(data["latents"])
    train, held_out = split_train_eval(len(source), data["eval_fraction"], config["seed"])
    folders = tokenizer_folders(config, workdir)
    if not data["tokenizers"]:
        _build_tokenizers((source[int(i)]["caption"] for i in train), data["tokenizer_vocab"], folders)
    tokenize = latent_tokenizers(config, workdir)
    transform = LatentTransform(source.manifest.latent_shift, source.manifest.latent_scale, **tokenize)
    dropping = dataclasses.replace(transform, caption_dropout=data["caption_dropout"])
    options = _options(config)
    return Batches(source, dropping, options, train), EvalBatches(source, transform, options, held_out)


def latent_tokenizers(config: Mapping[str, Any], workdir: Path) -> dict[str, Tokenize]:
    """The three tokenizers of `LatentTransform`, under the names of its arguments.

    Raises:
      UserError: a folder is none of a tokenizer, or holds more tokens than its text encoder.
    """
    data, model, folders = config["data"], config["model"], tokenizer_folders(config, workdir)
    return {
        argument: Tokenize(_load_tokenizer(folders[name], _vocab_size(model[encoder])), data[length])
        for argument, name, encoder, length in (
            ("tokenize", T5_TOKENIZER, "text_encoder_3", "max_length"),
            ("clip_tokenize", CLIP_TOKENIZERS[0], "text_encoder", "clip_max_length"),
            ("clip_2_tokenize", CLIP_TOKENIZERS[1], "text_encoder_2", "clip_max_length"),
        )
    }


def _clip_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    data = config["data"]
    source = _clips(data, config["seed"])
    train, held_out = split_train_eval(len(source), data["eval_fraction"], config["seed"])
    # A size of 0 is the whole side.
    cut, whole = (ClipTransform(**{k: v or None for k, v in data[name].items()}) for name in ("crop", "eval_crop"))
    options = _options(config)
    return Batches(source, cut, options, train), EvalBatches(source, whole, options, held_out)


def _decoder_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    """Clips, and their cached latents where the config names a folder of them."""
    data = config["data"]
    if not data["latents"]:
        return _clip_data(config, workdir)
    source = LatentClips(LatentSource(data["latents"]), _clips(data, config["seed"]))
    train, held_out = split_train_eval(len(source), data["eval_fraction"], config["seed"])
    sizes = lambda name: {k: v or None for k, v in data[name].items()}
    cut, whole = (LatentClipTransform(**sizes(name)) for name in ("crop", "eval_crop"))
    options = _options(config)
    return Batches(source, cut, options, train), EvalBatches(source, whole, options, held_out)


def _frame_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    data = config["data"]
    source = _clips(data, config["seed"])
    train, held_out = split_train_eval(len(source), data["eval_fraction"], config["seed"])
    cut, whole = (FrameTransform(**{k: v or None for k, v in data[name].items()}) for name in ("crop", "eval_crop"))
    options = _options(config)
    flipping = dataclasses.replace(cut, flips=data["flips"])
    return Batches(source, flipping, options, train), EvalBatches(source, whole, options, held_out)


def _clips(data: Mapping[str, Any], seed: int) -> ToyWorld | VideoFolder:
    sizes = (data["video_frames"], data["height"], data["width"])
    if bool(data["toy_clips"]) == bool(data["videos"]):
        raise UserError(
            f"config.data.toy_clips is {data['toy_clips']} and config.data.videos {data['videos']!r}: "
            "give a folder of videos with toy_clips 0, or a number of toy clips and no folder"
        )
    if data["toy_clips"]:
        return ToyWorld(data["toy_clips"], seed, *sizes, max(data["video_frames"], CLIP_FRAMES))
    if not data["captions"]:
        raise UserError("config.data.captions is empty: name the captions file of config.data.videos")
    videos, captions = Path(data["videos"]), Path(data["captions"])
    source = VideoFolder(videos, captions, *sizes, data["frame_rate"], data["clips_per_video"] or None)
    if source.skipped and jax.process_index() == 0:
        print(f"left out {len(source.skipped)} videos, first {': '.join(source.skipped[0])}", flush=True)
    return source


def _options(config: Mapping[str, Any]) -> LoaderOptions:
    return LoaderOptions(
        global_batch=config["batch_size"],
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _load_tokenizer(folder: Path, vocabulary: int) -> Any:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocabulary:
        raise UserError(f"{folder}: {len(tokenizer)} tokens do not fit vocab_size {vocabulary} of its text encoder")
    return tokenizer


def _vocab_size(sizes: Mapping[str, Any]) -> int:
    """Of a text encoder; a distilled T5 has its encoder's sizes one level down."""
    return sizes.get("encoder", sizes)["vocab_size"]


def _build_tokenizers(texts: Iterable[str], vocab_size: int, folders: Mapping[str, Path]) -> None:
    """One vocabulary of training text alone for all folders; with several processes the first builds, others wait."""
    if jax.process_index() == 0 and not all(folder.exists() for folder in folders.values()):
        built = folders[T5_TOKENIZER]
        os.makedirs(built.parent, exist_ok=True)
        if not built.exists():
            build_unigram_tokenizer(texts, vocab_size, built)
        for folder in folders.values():
            if not folder.exists():
                with new_folder(folder) as temporary:
                    shutil.copytree(built, temporary, dirs_exist_ok=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("tokenizers built")


DATA = {
    "text_encoder": _prompt_data,
    "teacher": _latent_data,
    "prune": _latent_data,
    "steps": _latent_data,
    "video_vae": _clip_data,
    "decoder": _decoder_data,
    "super_resolution": _frame_data,
}
