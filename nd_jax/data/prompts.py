"""Prompts with random access: text files, JSONL and ArrayRecord shards as one indexable source.

    .txt            one prompt a line
    .jsonl          one JSON object a line, the prompt under a key
    .array_record   a record is a JSON object with the key, or the prompt's text (anything that does not start with "{")

Everything is UTF-8. A source reads every record once when it opens, to validate it and to learn where it lies; after
that only a few integers per prompt stay in memory and prompts are read from the files on demand.
"""

import codecs
import dataclasses
import glob
import hashlib
import json
import os
import textwrap
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nd_jax.errors import UserError, first_line
from nd_jax.files import new_folder

SUFFIXES = (".txt", ".jsonl", ".array_record")
# Records that one call reads while an ArrayRecord file is validated.
READ_CHUNK = 4096

PathLike = str | os.PathLike


class PromptSource(Sequence[str]):
    """All prompts of some files, in the sorted order of the files' paths.

    Args:
      paths: a file, a glob pattern, a folder (all its files of one known suffix), or several of those.
      key: key of the prompt in JSON objects.
      skip_bad: leave malformed records out and count them, instead of raising.

    Attributes:
      paths: the files, sorted.
      num_skipped: number of malformed records left out.
      first_skipped: place and reason of the first of them, "" if there is none.
      fingerprint: SHA-256 (hex) of the prompts in order, whatever files and formats hold them.

    Raises:
      UserError: no such file, a file without prompts, or a malformed record; the message has the file and the line
        (the record's index for ArrayRecord).
    """

    def __init__(self, paths: PathLike | Sequence[PathLike], key: str = "prompt", skip_bad: bool = False):
        self.paths = find_prompt_files(paths)
        self.num_skipped = 0
        self.first_skipped = ""
        self._key = key
        self._skip_bad = skip_bad
        digest = hashlib.sha256()
        self._files = [self._index(path, digest) for path in self.paths]
        self._starts = np.cumsum([0] + [len(file.numbers) for file in self._files])
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> str:
        file, row = self._locate(index)
        try:
            return file.parse(file.read(row), self._key)
        except (_Malformed, OSError, RuntimeError) as error:
            # It was well-formed when the source opened.
            raise UserError(f"{self.where(index)}: changed while it was in use ({error}); start again") from error

    def where(self, index: int) -> str:
        """Place of a prompt: `file:line`, or `file: record N` for ArrayRecord."""
        file, row = self._locate(index)
        return file.place(file.numbers[row])

    def _locate(self, index: int) -> tuple["_File", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[file], int(index - self._starts[file])

    def _index(self, path: Path, digest) -> "_File":
        """Validates one file and notes its good records."""
        skipped = self.num_skipped
        try:
            file = _ArrayRecordFile(path) if path.suffix == ".array_record" else _LineFile(path)
            for raw, number, position in file.scan():
                try:
                    prompt = file.parse(raw, self._key)
                except _Malformed as error:
                    self._skip(f"{file.place(number)}: {error}")
                    continue
                file.add(number, position)
                text = prompt.encode("utf-8")
                digest.update(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
        if not len(file.numbers):
            bad = self.num_skipped - skipped
            reason = f"all {bad} records are malformed, first {self.first_skipped}" if bad else file.EMPTY
            raise UserError(f"{path}: holds no prompts ({reason}); give another file")
        return file

    def _skip(self, problem: str) -> None:
        if not self._skip_bad:
            raise UserError(f"{problem}; correct it, or set skip_bad=True to leave such records out")
        self.num_skipped += 1
        self.first_skipped = self.first_skipped or problem


def find_prompt_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The prompt files behind a path, a glob pattern, a folder or several of those: sorted, each once.

    Raises:
      UserError: a pattern or folder without prompt files, a folder with several formats, an unknown suffix.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given or any(not str(path) for path in given):
        raise UserError(
            f"prompts path {paths!r} is empty; name a {', '.join(SUFFIXES)} file, a folder or a glob pattern"
        )
    return sorted({found for path in given for found in _expand(Path(path))})


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
        formats = sorted({file.suffix for file in found})
        if len(formats) > 1:
            raise UserError(f"{path}: holds prompts in several formats ({', '.join(formats)}); name files or a pattern")
        remedy = f"a folder of prompts holds {', '.join(SUFFIXES)} files"
    elif glob.has_magic(str(path)) and not path.exists():
        found = [Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file)]
        remedy = "correct the pattern"
    else:
        found = [path]
    if not found:
        raise UserError(f"{path}: no file matches; {remedy}")
    for file in found:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{file}: suffix {file.suffix!r} is unknown; prompts come as {', '.join(SUFFIXES)}")
    return found


class _Malformed(ValueError):
    """Why a record holds no prompt, without its place."""


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Malformed(f"not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start} of the record)") from error


def _parse_text(raw: bytes, key: str) -> str:
    return _checked(_decode(raw))


def _parse_json(raw: bytes, key: str) -> str:
    text = _decode(raw)
    if not text.strip():
        raise _Malformed("blank")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise _Malformed(f"broken JSON ({error.msg} at column {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise _Malformed("broken JSON (a number or a nesting beyond all bounds)") from error
    if not isinstance(record, dict):
        raise _Malformed(f"a JSON object with key {key!r} is needed, not {_shown(record)}")
    if key not in record:
        raise _Malformed(f"no key {key!r} among {_shown(sorted(record))}")
    if not isinstance(record[key], str):
        raise _Malformed(f"key {key!r} is not a string but {_shown(record[key])}")
    return _checked(record[key])


def _parse_record(raw: bytes, key: str) -> str:
    return _parse_json(raw, key) if raw.lstrip().startswith(b"{") else _parse_text(raw, key)


def _checked(prompt: str) -> str:
    if not prompt.strip():
        raise _Malformed("blank prompt")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no tokenizer can read.
        raise _Malformed("the prompt has a lone surrogate, which is not Unicode text") from error
    return prompt


def _shown(value: object) -> str:
    return textwrap.shorten(json.dumps(value), 80, placeholder=" ...")


class _LineFile:
    """Lines of a text or JSONL file; a record's position is its byte offset and length."""

    EMPTY = "it is empty"

    def __init__(self, path: Path):
        self.path = path
        self.numbers = array("q")
        self.parse: Callable[[bytes, str], str] = _parse_json if path.suffix == ".jsonl" else _parse_text
        self._offsets = array("q")
        self._lengths = array("q")
        # A descriptor without a file position serves several reading threads at once.
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def scan(self) -> Iterator[tuple[bytes, int, tuple[int, int]]]:
        """Lines without their ends: (bytes, number from 1, (offset, length)); blank lines at the end are left out."""
        end = 0
        blanks = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    start, line = start + len(codecs.BOM_UTF8), line[len(codecs.BOM_UTF8) :]
                body = line.rstrip(b"\r\n")
                if not body.strip():
                    blanks += 1
                    continue
                for blank in range(number - blanks, number):
                    yield b"", blank, (0, 0)
                blanks = 0
                yield body, number, (start, len(body))

    def add(self, number: int, position: tuple[int, int]) -> None:
        self.numbers.append(number)
        self._offsets.append(position[0])
        self._lengths.append(position[1])

    def read(self, row: int) -> bytes:
        return os.pread(self._descriptor, self._lengths[row], self._offsets[row])

    def place(self, number: int) -> str:
        return f"{self.path}:{number}"


class _ArrayRecordFile:
    """Records of an ArrayRecord file; a record's position is its index."""

    EMPTY = "it is empty, cut short or no ArrayRecord file"

    def __init__(self, path: Path):
        from array_record.python import array_record_module

        self.path = path
        self.numbers = array("q")
        self.parse: Callable[[bytes, str], str] = _parse_record
        # The reader's own errors do not tell a missing file from a damaged one.
        os.close(os.open(path, os.O_RDONLY))
        self._reader = array_record_module.ArrayRecordReader(str(path))

    def scan(self) -> Iterator[tuple[bytes, int, int]]:
        """Records as (bytes, index, index)."""
        total = self._reader.num_records()
        for first in range(0, total, READ_CHUNK):
            last = min(first + READ_CHUNK, total)
            try:
                records = self._reader.read(first, last)
            except (RuntimeError, IndexError) as error:
                raise UserError(
                    f"{self.path}: damaged in records {first} to {last - 1}; make or copy it again"
                ) from error
            for index, raw in enumerate(records, first):
                yield raw, index, index

    def add(self, number: int, position: int) -> None:
        self.numbers.append(number)

    def read(self, row: int) -> bytes:
        return self._reader.read([self.numbers[row]])[0]

    def place(self, number: int) -> str:
        return f"{self.path}: record {number}"


_File = _LineFile | _ArrayRecordFile


def write_prompts_array_record(prompts: Sequence[str], folder: PathLike, shards: int = 1) -> list[Path]:
    """Writes prompts to a new folder of ArrayRecord shards, in order, so that `PromptSource(folder)` equals `prompts`.

    The folder appears when all shards are complete. Every record is a JSON object with the key `prompt`.

    Returns:
      The files `prompts-00000-of-NNNNN.array_record` and so on.

    Raises:
      UserError: the folder exists, a prompt is blank or not Unicode text, more shards than prompts, or a full disk.
    """
    from array_record.python import array_record_module

    if not 1 <= shards <= len(prompts):
        raise UserError(
            f"{shards} shards for {len(prompts)} prompts: use between 1 and {len(prompts) or 1} and some prompts"
        )
    bounds = np.linspace(0, len(prompts), shards + 1).astype(np.int64)
    names = [f"prompts-{shard:05d}-of-{shards:05d}.array_record" for shard in range(shards)]
    with new_folder(folder) as temporary:
        for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
            records = [_record(prompts[index], index) for index in range(first, last)]
            try:
                # Groups of one record: the fastest to read in a random order.
                writer = array_record_module.ArrayRecordWriter(str(temporary / name), "group_size:1")
                for record in records:
                    writer.write(record)
                writer.close()
            except RuntimeError as error:
                raise UserError(f"{Path(folder) / name}: cannot be written ({first_line(error)})") from error
    return [Path(folder) / name for name in names]


def _record(prompt: str, index: int) -> bytes:
    try:
        return json.dumps({"prompt": _checked(prompt)}, ensure_ascii=False).encode("utf-8")
    except _Malformed as error:
        raise UserError(f"prompt {index} cannot be written: {error}; leave it out") from error


@dataclasses.dataclass(frozen=True)
class PromptTransform:
    """Record transform of text training: drops captions at random, then tokenises.

    Attributes:
      tokenize: text -> {"ids": int32 [L], "mask": int32 [L]}.
      caption_dropout: probability that a prompt is replaced by the empty caption.
    """

    tokenize: Callable[[str], dict[str, np.ndarray]]
    caption_dropout: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise UserError(f"caption_dropout {self.caption_dropout} is not a probability; use a value from 0 to 1")

    def __call__(self, prompt: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self.tokenize("" if rng.random() < self.caption_dropout else prompt)


def split_train_eval(num_records: int, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits records 0..num_records-1 into disjoint training and held-out indices, both sorted, int64.

    The held-out records are those with the smallest hash of (seed, index): the same on every machine and with every
    version of numpy. At least one record is held out if `eval_fraction` > 0, and at least one is trained on.

    Raises:
      UserError: `eval_fraction` outside [0, 1), or too few records to have both sets.
    """
    if not 0.0 <= eval_fraction < 1.0:
        raise UserError(f"eval_fraction {eval_fraction} is out of range; use a value from 0 up to, not including, 1")
    num_eval = max(1, round(num_records * eval_fraction)) if eval_fraction else 0
    if num_records < 1 + bool(num_eval):
        raise UserError(f"{num_records} records cannot be split with eval_fraction {eval_fraction}; give more prompts")
    num_eval = min(num_eval, num_records - 1)
    start = int.from_bytes(hashlib.sha256(f"split {seed}".encode()).digest()[:8], "little")
    order = np.argsort(_mixed(np.arange(num_records, dtype=np.uint64) + np.uint64(start)), kind="stable")
    return np.sort(order[num_eval:]), np.sort(order[:num_eval])


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of uint64 (Steele, Lea, Flood: Fast splittable PRNGs, 2014)."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
