"""A walk of several commands that continues where it was interrupted.

Every stage is a command that a person could type, or a function for what has no command. What it gave is noted in
WORKDIR/stages/NAME.json with its command and seconds; a stage with such a note is not run again.
"""

import argparse
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError
from nd_jax.files import write_text


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a walk.

    Attributes:
      what: what it does, in a few words.
      finish: gives the stage's numbers, once the command is done.
      command: arguments of a process, or None.
      folder: folder below the workdir that is removed when the stage is asked for again; a training run would
        otherwise see that it is finished.
      always: run it every time, such as a report.
    """

    what: str
    finish: Callable[[], Any]
    command: Sequence[str] | None = None
    folder: str | None = None
    always: bool = False


Stages = dict[str, Stage]


def python(module: str, *args: Any) -> list[str]:
    """Arguments of `python -m module args`."""
    return [sys.executable, "-m", module, *map(str, args)]


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """--only and --from."""
    chosen = parser.add_mutually_exclusive_group()
    say = lambda what: dict(choices=names, metavar="STAGE", help=what)
    chosen.add_argument("--only", **say(f"run this stage alone, again if it was done; stages: {', '.join(names)}"))
    chosen.add_argument("--from", dest="start", **say("run this stage and all after it again"))


def run_stages(workdir: Path, stages: Stages, only: str | None = None, start: str | None = None) -> None:
    """Runs what is not done.

    Args:
      workdir: of the walk; exists.
      stages: in order.
      only: run this one alone, again if it was done.
      start: run this one and all after it again.

    Raises:
      UserError: a stage failed, or was done before with another command.
    """
    (workdir / "stages").mkdir(exist_ok=True)
    names = list(stages)
    again = {only} if only else set(names[names.index(start) :]) if start else set()
    for name in [only] if only else names:
        stage = stages[name]
        if name not in again and not stage.always and _done_before(workdir, name, stage):
            print(f"== {name}: done before", flush=True)
            continue
        if name in again and stage.folder:
            shutil.rmtree(workdir / stage.folder, ignore_errors=True)
        _run(workdir, name, stage)


def read_results(workdir: Path, stages: Stages) -> dict[str, dict[str, Any]]:
    """Stage -> {"result", "seconds"[, "command"]} of all that note one.

    Raises:
      UserError: one has not been run.
    """
    notes = {name: _read(workdir, name) for name, stage in stages.items() if not stage.always}
    missing = [name for name, note in notes.items() if note is None]
    if missing:
        raise UserError(f"stage {missing[0]} has not been run in {workdir}: run it with --only {missing[0]}")
    return notes


def _run(workdir: Path, name: str, stage: Stage) -> None:
    print(f"== {name}: {stage.what}", flush=True)
    begin = time.monotonic()
    note: dict[str, Any] = {}
    if stage.command is not None:
        note["command"] = _shown(stage.command)
        print("   " + note["command"], flush=True)
        status = subprocess.run(stage.command, check=False).returncode
        if status:
            raise UserError(
                f"stage {name} failed with status {status}, see above; run the same command to continue there"
            )
    note["result"] = stage.finish()
    if isinstance(note["result"], dict) and note["result"].get("interrupted"):
        # A training that was told to stop saves and ends well, but it is not done.
        raise UserError(f"stage {name} was interrupted; run the same command to continue there")
    note["seconds"] = time.monotonic() - begin
    write_text(_file(workdir, name), json.dumps(note, indent=2) + "\n")


def _done_before(workdir: Path, name: str, stage: Stage) -> bool:
    """Whether a stage is done; one that was done by another command is the user's decision, not ours."""
    note = _read(workdir, name)
    if note is None:
        return False
    command = None if stage.command is None else _shown(stage.command)
    if note.get("command") != command:
        raise UserError(
            f"{workdir}: stage {name} was done with other arguments ({note.get('command')}): "
            f"choose another --workdir, or --from {name} to do it again"
        )
    return True


def _shown(command: Sequence[str]) -> str:
    return shlex.join(["python", *command[1:]])


def _file(workdir: Path, name: str) -> Path:
    return workdir / "stages" / f"{name}.json"


def _read(workdir: Path, name: str) -> dict[str, Any] | None:
    path = _file(workdir, name)
    return json.loads(path.read_text()) if path.exists() else None
