"""Tokenizers of a model folder, and a small one of T5's kind built from prompts.

A released model folder has `tokenizer` and `tokenizer_2` (CLIP) and `tokenizer_3` (T5). They load through
`transformers`, which is imported where it is needed because that takes seconds.
"""

import copy
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nd_jax.errors import UserError
from nd_jax.files import new_folder

# Each set of files holds a whole vocabulary. Without one, transformers silently builds a tokenizer of four tokens.
VOCABULARY_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def load_tokenizer(folder: str | os.PathLike):
    """The fast tokenizer in a `tokenizer*` subfolder of a model folder; nothing is downloaded and no code of it is run.

    Returns:
      A `transformers` tokenizer with a `tokenizers` backend.

    Raises:
      UserError: no such folder, a missing or broken file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such tokenizer folder; name a tokenizer* subfolder of a model folder")
    names = {path.name for path in folder.iterdir()}
    inner = sorted(path.name for path in folder.glob("tokenizer*") if path.is_dir())
    if inner and "tokenizer_config.json" not in names:
        raise UserError(f"{folder}: is a model folder, not a tokenizer folder; name its subfolder {' or '.join(inner)}")
    if "tokenizer_config.json" not in names or not any(names.issuperset(files) for files in VOCABULARY_FILES):
        needed = ", or ".join(" with ".join(files) for files in VOCABULARY_FILES)
        raise UserError(f"{folder}: is incomplete; a tokenizer has tokenizer_config.json and {needed}")
    for path in sorted(folder.glob("*.json")):
        _check_json(path)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the backend raises plain Exception for a damaged vocabulary
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the tokenizer does not load ({reason}); copy the folder again") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: {type(tokenizer).__name__} has no fast tokenizer; add a tokenizer.json")
    return tokenizer


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON; copy the file again") from error


class Tokenize:
    """Text -> {"ids": int32 [max_length], "mask": int32 [max_length]}, mask 1 on tokens and 0 on padding.

    The same numbers as `tokenizer(text, padding="max_length", max_length=max_length, truncation=True,
    add_special_tokens=True)`, in about half the time. Safe to call from several threads.

    Args:
      tokenizer: from `load_tokenizer`; it is copied, its own settings do not change.
      max_length: tokens after padding or truncation, the end token included.

    Raises:
      UserError: `max_length` leaves no room for a token, or the tokenizer has no padding token.
    """

    def __init__(self, tokenizer, max_length: int = 128):
        added = tokenizer.num_special_tokens_to_add(pair=False)
        if max_length <= added:
            raise UserError(f"max_length {max_length} has no room for a token beside {added} special ones; raise it")
        if tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path} has no padding token; set pad_token in its config")
        # A fast tokenizer keeps padding and truncation as state of its backend. In a private copy nobody changes them
        # between threads, and setting them by one call leaves their details to transformers.
        own = copy.deepcopy(tokenizer)
        own("", padding="max_length", max_length=max_length, truncation=True, add_special_tokens=True)
        self._backend = own.backend_tokenizer

    def __call__(self, text: str) -> dict[str, np.ndarray]:
        encoding = self._backend.encode(text, add_special_tokens=True)
        return {
            "ids": np.array(encoding.ids, np.int32),
            "mask": np.array(encoding.attention_mask, np.int32),
        }


def build_unigram_tokenizer(prompts: Iterable[str], vocab_size: int, output_folder: str | os.PathLike) -> int:
    """Trains a unigram tokenizer of T5's kind and writes it as a new `tokenizer_3` folder.

    Ids 0, 1, 2 are padding, end and unknown. Normalisation (nmt_nfkc), word boundaries and the end token are T5's;
    there are no sentinel tokens. The folder has `spiece.model`, `tokenizer.json` and `tokenizer_config.json` as
    released ones do and loads with `load_tokenizer` and with `transformers.T5Tokenizer.from_pretrained`. The same
    prompts in the same order give the same bytes: this is why SentencePiece trains it, on one thread, and not the
    trainer of the `tokenizers` package, whose result differs from run to run.

    Args:
      prompts: training text.
      vocab_size: upper limit of the vocabulary, special tokens included; little text gives fewer tokens.
      output_folder: must not exist.

    Returns:
      The size of the vocabulary.

    Raises:
      UserError: no prompts, a vocabulary too small for the characters of the text, the folder exists, or a full disk.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Tokenizer

    sentences = iter(prompts)
    first = next(sentences, None)
    if first is None:
        raise UserError(f"{output_folder}: no prompts to build a tokenizer from; give at least one")
    with new_folder(output_folder) as folder:
        trained = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_chain(first, sentences),
                model_writer=trained,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="nmt_nfkc",
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                pad_piece=PAD,
                eos_piece=EOS,
                unk_piece=UNK,
                max_sentence_length=1 << 20,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-160:]
            raise UserError(
                f"no tokenizer with vocab_size {vocab_size} can be trained ({reason}); change it"
            ) from error
        model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
        tokenizer = T5Tokenizer(
            vocab=[(piece.piece, piece.score) for piece in model.pieces],
            _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap,
            extra_ids=0,
        )
        (folder / "spiece.model").write_bytes(trained.getvalue())
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        # Written by hand: what transformers 5 saves has keys that transformers 4 does not read.
        config = {
            "tokenizer_class": "T5Tokenizer",
            "pad_token": PAD,
            "eos_token": EOS,
            "unk_token": UNK,
            "extra_ids": 0,
            "model_max_length": 512,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(model.pieces)


def _chain(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest
