"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from nd_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; on success it is synced and takes `path`'s name, else it is removed.

    Raises:
      UserError: the disk is full, or the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; free some space and run again (no partial file is left)"
            ) from error
        raise UserError(f"{path}: cannot be written ({error.strerror}); check the path and its permissions") from error
    finally:
        with contextlib.suppress(OSError):  # renamed already, or never made
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file by way of `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def state_of_files(places: Iterable[Path]) -> str:
    """Names, sizes and times of files, and of the files in folders, as one short text; equal while none was rewritten.

    Nothing is read: it is for files of gigabytes. What is missing is left out.
    """
    listed = [sorted(place.iterdir()) if place.is_dir() else [place] for place in places]
    stats = [(str(path), path.stat()) for paths in listed for path in paths if path.is_file()]
    text = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty temporary sibling of `path` and renames it to `path` when the block succeeds.

    When the block raises, the temporary folder is removed and `path` was never there.

    Raises:
      UserError: `path` exists and is not an empty folder, or the disk refuses (full, read-only).
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already; remove it or choose another output folder")
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); check the disk and its permissions") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(folder: Path, marker: str = "config.json") -> Iterator[Path]:
    """A temporary sibling of `folder` to fill; on success it takes the folder's name, else it is removed.

    Raises:
      UserError: `folder` exists, is not empty, and holds no `marker`, so that it is something else; or its parent
        cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))):
        raise UserError(f"{folder}: exists and is not a folder with {marker}; move it away or choose another output")
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        if old.exists() and not folder.exists():
            old.rename(folder)  # An earlier run ended between its two renames.
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); check the path and its permissions"
        ) from error
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space or check permissions") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
