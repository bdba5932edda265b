"""Output files that appear together, each complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError
from nd_jax.files import write_text


@contextlib.contextmanager
def replacing_files(output_dir: Path, head: str) -> Iterator[Path]:
    """A scratch folder inside `output_dir`; on success its files take their names there, else nothing changes.

    Args:
      output_dir: created if needed.
      head: the file that refers to the others. It goes first and comes last, so that it never stands beside the files
        of another run.

    Raises:
      UserError: the folder cannot be written, or the disk is full.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{head}-", dir=output_dir))
    except OSError as error:
        raise UserError(f"{output_dir}: cannot be written ({error.strerror}); choose another output") from error
    try:
        yield scratch
        (output_dir / head).unlink(missing_ok=True)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == head):
            os.replace(path, output_dir / path.name)
    except OSError as error:
        raise UserError(f"{output_dir}: cannot be written ({error.strerror}); free space and run again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report; NaN and infinity, which JSON does not have, raise ValueError."""
    write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
