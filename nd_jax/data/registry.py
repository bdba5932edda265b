"""From a config (plain dictionary) to the batches of a method. One line per method."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from nd_jax.data.loader import Batches, EvalBatches, LoaderOptions
from nd_jax.data.prompts import PromptSource, PromptTransform, split_train_eval
from nd_jax.data.tokenizers import Tokenize, build_unigram_tokenizer, load_tokenizer
from nd_jax.errors import UserError

TOKENIZER_FOLDER = "tokenizer_3"


def build_data(config: Mapping[str, Any], workdir: Path) -> tuple[Batches, EvalBatches]:
    """(endless training batches, held-out batches) of this process."""
    if config["method"] not in DATA:
        raise UserError(f"method is {config['method']!r}: known methods are {', '.join(sorted(DATA))}")
    return DATA[config["method"]](config, workdir)


def tokenizer_folder(config: Mapping[str, Any], workdir: Path) -> Path:
    """The T5 tokenizer of a run: the one that the config names, or the one built into the workdir."""
    return Path(config["data"]["tokenizer"] or workdir / TOKENIZER_FOLDER)


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
    folder = tokenizer_folder(config, workdir)
    if not data["tokenizer"] and not folder.exists():
        _build_tokenizer(source, train, data["tokenizer_vocab"], folder)
    tokenizer = load_tokenizer(folder)
    vocabulary = config["student"]["encoder"]["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{folder}: {len(tokenizer)} tokens do not fit vocab_size {vocabulary} of the student's encoder"
        )
    options = LoaderOptions(
        global_batch=config["batch_size"],
        seed=config["seed"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    tokenize = Tokenize(tokenizer, data["max_length"])
    return (
        Batches(source, PromptTransform(tokenize, data["caption_dropout"]), options, train),
        EvalBatches(source, PromptTransform(tokenize), options, held_out),
    )


def _build_tokenizer(source: PromptSource, indices: Any, vocab_size: int, folder: Path) -> None:
    """From training prompts alone; with several processes the first builds and the others wait."""
    if jax.process_index() == 0:
        os.makedirs(folder.parent, exist_ok=True)
        build_unigram_tokenizer((source[int(i)] for i in indices), vocab_size, folder)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("tokenizer built")


DATA = {"text_encoder": _prompt_data}
