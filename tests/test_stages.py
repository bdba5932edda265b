"""Walks of several commands: what is done stays done, what was asked for again is forgotten at once, and nothing
works in a folder twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import stages, stages_bar
from experiments.stages import Stage
from nd_jax.errors import UserError

NOTHING = [sys.executable, "-c", "pass"]


def noted(workdir):
    return sorted(path.stem for path in (workdir / "stages").glob("*.json"))


def appending(path, word):
    """A command that writes a word to a file."""
    return [sys.executable, "-c", f"open({str(path)!r}, 'a').write({word!r} + ' ')"]


def words(path):
    return path.read_text().split()


def walk(workdir, *names):
    """Stages that write their names into done.txt, each with a folder."""
    done = workdir / "done.txt"
    return {n: Stage(f"do {n}", lambda n=n: {"name": n}, appending(done, n), folder=n) for n in names}


def test_done_stages_are_kept_and_the_last_one_is_always_run(tmp_path, capsys):
    reports = []
    walked = walk(tmp_path, "a", "b") | {"report": Stage("report", lambda: reports.append(1), always=True)}
    for _ in range(2):
        stages.run_walk("walk", tmp_path, walked)
    assert words(tmp_path / "done.txt") == ["a", "b"] and len(reports) == 2
    out = capsys.readouterr().out
    assert "== a: do a" in out and "== a: done before" in out and out.count("walk done in") == 2
    results = stages.read_results(tmp_path, walked)
    assert [results[name]["result"] for name in "ab"] == [{"name": "a"}, {"name": "b"}]
    assert all(note["seconds"] > 0 and note["cpu_seconds"] > 0 for note in results.values())
    hungry = {"a": Stage("take memory", dict, [sys.executable, "-c", "len(b'x' * (3 * 10**8))"])}
    stages.run_walk("walk", tmp_path / "hungry", hungry)
    assert stages.read_results(tmp_path / "hungry", hungry)["a"]["peak_bytes"] > 3 * 10**8


def test_from_forgets_all_later_stages_before_it_begins(tmp_path):
    """So that what is interrupted then goes on without being told so, and never with results of before."""
    walked = walk(tmp_path, "a", "b", "c")
    stages.run_stages(tmp_path, walked)
    for name in walked:
        (tmp_path / name).mkdir()
    failing = walked | {"b": Stage("fail", dict, [sys.executable, "-c", "raise SystemExit(3)"], folder="b")}
    with pytest.raises(UserError, match="stage b failed with status 3"):
        stages.run_stages(tmp_path, failing, start="b")
    assert noted(tmp_path) == ["a"]
    assert [name for name in walked if (tmp_path / name).is_dir()] == ["a"]
    stages.run_stages(tmp_path, walked)
    assert words(tmp_path / "done.txt") == ["a", "b", "c", "b", "c"]
    stages.run_stages(tmp_path, walked, only="a")
    assert words(tmp_path / "done.txt")[-1] == "a"


def test_unknown_stages_and_other_arguments_are_refused(tmp_path):
    walked = walk(tmp_path, "a")
    with pytest.raises(UserError, match="stage z is no part of this walk: its stages are a"):
        stages.run_walk("walk", tmp_path, walked, only="z")
    stages.run_walk("walk", tmp_path, walked)
    other = {"a": Stage("do a", dict, NOTHING)}
    with pytest.raises(UserError, match=r"done with other arguments .*choose another --workdir, or --from a"):
        stages.run_walk("walk", tmp_path, other)
    with pytest.raises(UserError, match="stage b has not been run"):
        stages.read_results(tmp_path, walk(tmp_path, "a", "b"))


def test_commands_share_what_they_compile(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    say = f"import os; open({str(tmp_path / 'cache')!r}, 'w').write(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    walked = {"a": Stage("say", dict, [sys.executable, "-c", say])}
    stages.run_stages(tmp_path, walked)
    assert (tmp_path / "cache").read_text() == str(tmp_path.resolve() / "compilation_cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    stages.run_stages(tmp_path, walked, only="a")
    assert (tmp_path / "cache").read_text() == "elsewhere"


WALK = """
import sys, pathlib
from experiments.stages import Stage, run_stages
work = pathlib.Path(sys.argv[1])
sleep = [sys.executable, "-c", "import time, sys; open(sys.argv[1], 'w').close(); time.sleep(float(sys.argv[2])); "
         "open(sys.argv[1] + '.end', 'w').close()", str(work / "begun"), sys.argv[2]]
run_stages(work, {"a": Stage("sleep", lambda: {}, sleep)})
"""


def start_walk(workdir, seconds):
    with (workdir / "stderr").open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", WALK, str(workdir), str(seconds)], stderr=errors)
    end = time.monotonic() + 60
    while not (workdir / "begun").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    return process


def test_sigterm_ends_the_command_too(tmp_path):
    process = start_walk(tmp_path, 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert noted(tmp_path) == [] and not (tmp_path / "begun.end").exists()
    stages.run_stages(tmp_path, walk(tmp_path, "b"))  # Nobody holds the folder any more.


def test_a_command_that_outlives_its_walk_is_waited_for(tmp_path):
    process = start_walk(tmp_path, 3)
    process.kill()
    process.wait(30)
    assert not (tmp_path / "begun.end").exists()
    (tmp_path / "begun").unlink()
    # The second walk begins its command only when the first one's is done.
    second = start_walk(tmp_path, 0)
    assert (tmp_path / "begun.end").exists()
    assert second.wait(30) == 0 and noted(tmp_path) == ["a"]
    assert "another run works there; waiting" in (tmp_path / "stderr").read_text()


# --- the bar ----------------------------------------------------------------------------------------------------------


def test_time_left_follows_the_pace_of_the_machine():
    weights = {"a": 100.0, "b": 300.0}
    assert stages_bar.time_left(weights, 0, 0, 0) == 400
    # Too early to tell how fast this machine is.
    assert stages_bar.time_left(weights, 0, 10, 500) == 390
    assert stages_bar.time_left(weights, 100, 0, 200) == 600
    assert stages_bar.time_left(weights, 100, 150, 250) == 150
    assert stages_bar.time_left(weights, 400, 0, 1000) == 0


def test_a_terminal_shows_the_bar_and_keeps_what_commands_print(tmp_path):
    """In a pseudo-terminal: the stage and its last line are seen, and a failed command's log."""
    import pty

    code = (
        "import sys, pathlib; from experiments.stages import Stage, run_stages; work = pathlib.Path(sys.argv[1])\n"
        "say = lambda code: [sys.executable, '-c', code]\n"
        "good = say('import time; print(\"step 1 of 2\", flush=True); time.sleep(0.8)')\n"
        "bad = say('print(\"no such thing\"); raise SystemExit(1)')\n"
        "run_stages(work, {'good': Stage('be good', dict, good), 'bad': Stage('fail', dict, bad)})\n"
    )
    read, write = pty.openpty()
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=write, stderr=write, env=environment)
    os.close(write)
    seen = b""
    while process.poll() is None or not seen:
        try:
            seen += os.read(read, 2**16)
        except OSError:  # Linux's way of saying that nobody writes there any more.
            break
    process.wait(30)
    os.close(read)
    for expected in (b"1/2", b"step 1 of 2", b"left", b"no such thing", b"stage bad failed"):
        assert expected in seen, seen.decode()
    assert (tmp_path / "stages" / "good.log").read_text() == "step 1 of 2\n"
    assert json.loads((tmp_path / "stages" / "good.json").read_text())["result"] == {}
