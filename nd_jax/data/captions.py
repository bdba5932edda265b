"""Captions of videos in a file.

    .jsonl   one JSON object a line: {"video": "clips/one.mp4", "caption": "a dog runs"}; further keys are ignored
    .csv     a header line with the columns video and caption; further columns are ignored
    .txt     one line a video: its name, a tab, its caption

Names are paths below the folder of videos, with forward slashes. The file may be foreign, so a name that leaves that
folder is refused. Everything is UTF-8.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from nd_jax.errors import UserError, first_line

Row = tuple[int, str, str]


def read_captions(path: Path) -> dict[str, str]:
    """Name of a video -> its caption, in the order of the file.

    Raises:
      UserError: no such file, an unknown suffix, a malformed line, a name that leaves the folder of videos, or one that
        comes twice; with the number of the line.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise UserError(f"{path}: suffix {path.suffix!r} is unknown; captions come as {', '.join(READERS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    captions: dict[str, str] = {}
    try:
        for line, name, caption in READERS[path.suffix](text):
            _check(line, name, caption)
            if name in captions:
                raise _Malformed(line, f"the video {name!r} comes twice")
            captions[name] = caption
    except _Malformed as error:
        raise UserError(f"{path}:{error}; correct the line") from error
    if not captions:
        raise UserError(f"{path}: holds no captions; give another file")
    return captions


class _Malformed(ValueError):
    """A line and what is wrong with it."""

    def __init__(self, line: int, problem: str):
        super().__init__(f"{line}: {problem}")


def _check(line: int, name: object, caption: object) -> None:
    for key, value in (("video", name), ("caption", caption)):
        if not isinstance(value, str) or not value.strip():
            raise _Malformed(line, f"{key} is {value!r}, and a text is needed")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise _Malformed(line, f"{key} has a lone surrogate, which is not Unicode text")
    if PurePosixPath(name).is_absolute() or ".." in name.split("/") or any(c in name for c in "\\\0"):
        raise _Malformed(line, f"the name {name!r} leaves the folder of videos, refused")


def _jsonl(text: str) -> Iterator[Row]:
    # Only these end a line of JSONL; `splitlines` also knows characters that JSON strings may hold.
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise _Malformed(line, f"broken JSON ({first_line(error)})") from error
        if not isinstance(record, dict):
            raise _Malformed(line, "a JSON object with the keys video and caption is needed")
        yield line, record.get("video"), record.get("caption")


def _csv(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = {"video", "caption"} - set(reader.fieldnames or ())
        if missing:
            raise _Malformed(1, f"the header lacks the column {' and '.join(sorted(missing))}")
        for record in reader:
            yield reader.line_num, record["video"], record["caption"]
    except csv.Error as error:
        raise _Malformed(reader.line_num, f"broken CSV ({first_line(error)})") from error


def _txt(text: str) -> Iterator[Row]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        name, tab, caption = row.partition("\t")
        if not tab:
            raise _Malformed(line, "no tab between the video's name and its caption")
        yield line, name, caption.rstrip("\r")


READERS: dict[str, Callable[[str], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}
