"""Output folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nd_jax.errors import UserError


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
