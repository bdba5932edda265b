"""VBench's prompts, and the names of the videos that it reads: `{prompt}-{sample}.mp4`, samples 0 to 4.

    .json    VBench_full_info.json: a list of objects with `prompt_en` and a list `dimension`
    .txt     a prompt a line (all_dimension.txt); the file's name may be that of the dimension (scene.txt)
    .jsonl   an object a line with `prompt` and, if known, a list `dimensions`

VBench finds a video by its prompt alone, so a prompt that several lines or files hold is one prompt. Where a model is
given longer texts, those that VBench publishes for its prompts or others, the videos keep the names of the prompts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nd_jax.data.prompts import PromptSource
from nd_jax.errors import UserError
from nd_jax.evals.vbench import DIMENSIONS

SUFFIX = ".mp4"
SAMPLES = 5
# Of a name, on all common file systems.
NAME_BYTES = 255
# Keys of the prompt and of its dimensions.
ENTRY_KEYS = {".json": ("prompt_en", "dimension"), ".jsonl": ("prompt", "dimensions")}


class VBenchPrompt(NamedTuple):
    """A prompt, the text that a model gets for it, and the dimensions that its videos are for (empty: not known)."""

    prompt: str
    text: str
    dimensions: tuple[str, ...] = ()


def video_name(prompt: str, sample: int) -> str:
    """Name of a video's file.

    Raises:
      UserError: a prompt that cannot be a name.
    """
    name = f"{prompt}-{sample}{SUFFIX}"
    if "/" in prompt or "\0" in prompt:
        raise UserError(
            f"prompt {prompt!r}: holds a / or a zero byte, which no file's name can; VBench finds videos by the "
            "prompt in their names, so change the prompt"
        )
    if len(name.encode()) > NAME_BYTES:
        raise UserError(
            f"prompt {prompt[:40]!r}...: its file's name would have {len(name.encode())} bytes, above {NAME_BYTES}; "
            "give VBench's short prompts, and long texts for the model by --augmented"
        )
    return name


def read_prompts(
    paths: Sequence[Path], dimensions: Sequence[str] = (), augmented: Path | None = None
) -> list[VBenchPrompt]:
    """The prompts of some files, each once, in the order of their first places.

    Args:
      paths: files, see above.
      dimensions: keep the prompts of these alone.
      augmented: a .txt file with texts for the model in the place of the prompts, line by line those of the one .txt
        file in `paths`.

    Raises:
      UserError: a malformed file, no prompt left, a prompt that cannot be a file's name, dimensions that are unknown
        or asked of a file without any, or texts that do not go with the prompts.
    """
    for name in dimensions:
        if name not in DIMENSIONS:
            raise UserError(f"dimension {name!r} is unknown; VBench's are {', '.join(DIMENSIONS)}")
    lines = [line for path in paths for line in _read(path)]
    if augmented is not None:
        texts = _read_texts(paths, augmented)
        if len(texts) != len(lines):
            raise UserError(f"{augmented}: has {len(texts)} texts for {len(lines)} prompts; give one a line for each")
        lines = [line._replace(text=text) for line, text in zip(lines, texts, strict=True)]
    prompts: dict[str, VBenchPrompt] = {}
    for line in lines:
        video_name(line.prompt, 0)
        # The first text stands: one name has one video.
        known = prompts.setdefault(line.prompt, line)
        merged = tuple(dict.fromkeys((*known.dimensions, *line.dimensions)))
        prompts[line.prompt] = known._replace(dimensions=merged)
    if dimensions and not any(prompt.dimensions for prompt in prompts.values()):
        raise UserError(f"{paths[0]}: does not tell its prompts' dimensions; give VBench_full_info.json")
    found = [prompt for prompt in prompts.values() if not dimensions or set(dimensions).intersection(prompt.dimensions)]
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: holds no prompt of {', '.join(dimensions) or 'any kind'}")
    return found


def _read(path: Path) -> list[VBenchPrompt]:
    if path.suffix == ".txt":
        # As in VBench's own lists, whose lines it strips.
        dimensions = (path.stem,) if path.stem in DIMENSIONS else ()
        return [VBenchPrompt(line.strip(), line.strip(), dimensions) for line in PromptSource(path)]
    if path.suffix not in ENTRY_KEYS:
        raise UserError(f"{path}: suffix {path.suffix!r} is unknown; VBench's prompts come as .json, .jsonl or .txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else [text]
        entries = [json.loads(line) for line in lines]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check --prompts") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy it again") from error
    if path.suffix == ".json":
        if not isinstance(entries[0], list):
            raise UserError(f"{path}: not a list of prompts; give VBench_full_info.json, .txt or .jsonl")
        (entries,) = entries
    return [_entry(entry, f"{path}: entry {k}", *ENTRY_KEYS[path.suffix]) for k, entry in enumerate(entries, 1)]


def _entry(entry: Any, place: str, prompt_key: str, dimensions_key: str) -> VBenchPrompt:
    prompt = entry.get(prompt_key) if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place}: no text under {prompt_key!r}; correct the file")
    dimensions = entry.get(dimensions_key, [])
    if not isinstance(dimensions, list) or not all(isinstance(name, str) for name in dimensions):
        raise UserError(f"{place}: {dimensions_key!r} is not a list of names; correct the file")
    return VBenchPrompt(prompt, prompt, tuple(dimensions))


def _read_texts(paths: Sequence[Path], augmented: Path) -> list[str]:
    if len(paths) != 1 or paths[0].suffix != ".txt" or augmented.suffix != ".txt":
        # VBench_full_info.json has another order than all_dimension.txt, to which VBench's longer prompts belong.
        raise UserError(f"{augmented}: --augmented goes with one .txt file of prompts; give both as .txt files")
    return [text.strip() for text in PromptSource(augmented)]
