"""The page to try a model: a video through HTTP, what is refused, and the page in a browser."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from experiments import demo, demo_jobs, generate
from experiments.random_model import write_random_model
from nd_jax.errors import UserError
from nd_jax.generate.videos import read_image
from tests.browser import Browser, find_chromium

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model folder of each kind: `tiny-teacher` is monolithic, `tiny` hybrid with all components."""
    root = tmp_path_factory.mktemp("demo")
    for size in ("tiny", "tiny-teacher"):
        write_random_model(root / size, size, dtype="float32")
    return root


@contextlib.contextmanager
def serving(model, files):
    files.mkdir()
    args = demo.parse(["--model", str(model), "--port", "0", "--dtype", "float32"])
    jobs = demo_jobs.Jobs(args, files)
    with demo.DemoServer(args.host, args.port, jobs) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    jobs.close()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serving(folder / "tiny-teacher", tmp_path_factory.mktemp("files") / "files") as server:
        yield server


@pytest.fixture(scope="module")
def hybrid_about(folder):
    return demo_jobs.describe(demo.parse(["--model", str(folder / "tiny"), "--dtype", "float32"]))


def ask(server, path, body=None, method=None, **headers):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        headers = {"Content-Type": "application/json", **headers}
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, response.headers, answer


def post(server, **values):
    status, _, body = ask(server, "/jobs", json.dumps(values))
    return status, json.loads(body)


def finished(server, id):
    states = []
    while not states or states[-1]["state"] in ("waiting", "running"):
        time.sleep(0.05)
        status, _, body = ask(server, f"/jobs/{id}")
        assert status == 200
        states.append(json.loads(body))
    return states


def png(width, height):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


# --- a video ----------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file(server):
    status, headers, body = ask(server, "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert body == demo.PAGE.read_bytes() and b"://" not in body


def test_what_the_folder_allows(server, hybrid_about):
    about = json.loads(ask(server, "/model")[2])
    assert about["mode"] == "monolithic" and list(about["modes"]) == ["monolithic", "hybrid"]
    expected = {"steps": [1, 1, 1], "first_steps": [2, 1, 1], "takes_image": False, "needs_image": False}
    assert about["modes"]["monolithic"] == expected
    assert about["modes"]["hybrid"]["needs_image"] and about["super_resolution"] is None
    assert (about["height"], about["video_frames"], about["frame_rate"]) == (64, 9, 8)
    assert hybrid_about["mode"] == "hybrid" and hybrid_about["super_resolution"] == 2
    assert not hybrid_about["modes"]["hybrid"]["needs_image"]


def test_a_video_is_that_of_the_command(server, folder, tmp_path):
    status, answer = post(server, prompt=f" {PROMPT}\n", seed=3)
    assert status == 202
    *_, done = finished(server, answer["id"])
    assert done["state"] == "done" and done["prompt"] == PROMPT and not done["unsafe"]
    assert [part["part"] for part in done["parts"]] == ["text", "latents", "frames"]
    assert all(part["done"] == part["total"] > 0 for part in done["parts"])
    assert set(done["seconds"]) == {"text", "transformer", "decoder"} and done["seconds_total"] > 0
    assert done["settings"]["seed"] == 3 and done["settings"]["function_evaluations"] == 14

    status, headers, video = ask(server, done["video"])
    assert status == 200 and headers["Content-Type"] == "video/mp4"
    (tmp_path / "prompts.txt").write_text(PROMPT + "\n")
    output = tmp_path / "videos"
    options = {"model": folder / "tiny-teacher", "prompts": tmp_path / "prompts.txt", "output": output, "seed": 3}
    assert generate.main([f"--{name}={value}" for name, value in options.items()]) == 0
    (expected,) = output.glob("*.mp4")
    assert video == expected.read_bytes()

    status, headers, part = ask(server, done["video"], Range="bytes=5-99")
    assert status == 206 and part == video[5:100]
    assert headers["Content-Range"] == f"bytes 5-99/{len(video)}"
    assert ask(server, done["video"], Range="bytes=5-")[2] == video[5:]
    assert ask(server, done["video"], Range=f"bytes={len(video)}-")[0] == 416


class Held:
    """In the place of `make_videos`: notes prompts, and waits to be let go; the prompt "bad" fails."""

    def __init__(self):
        self.go, self.prompts, self.parts = threading.Event(), [], None

    def __call__(self, args, parts, jobs, progress):
        self.prompts.append(jobs[0].prompt)
        self.parts = parts
        progress.phase("latents", 2)
        progress.advance()
        assert self.go.wait(60)
        progress.advance()
        if jobs[0].prompt == "bad":
            raise MemoryError("out of memory\nand more")
        jobs[0].file(".mp4").write_bytes(jobs[0].prompt.encode())
        return {"seconds": {}, "seconds_total": 1.0}


@pytest.fixture
def held(monkeypatch):
    held = Held()
    monkeypatch.setattr("experiments.generate_videos.make_videos", held)
    yield held
    held.go.set()


def test_one_at_a_time_and_the_others_wait(server, held, monkeypatch, capsys):
    monkeypatch.setattr(demo_jobs, "WAITING", 2)
    ids = [post(server, prompt=prompt)[1]["id"] for prompt in ("one", "bad", "three")]
    status, answer = post(server, prompt="four")
    assert status == 503 and answer["error"].startswith("3 videos are waited for already")
    while not held.prompts:
        time.sleep(0.01)
    first, second, third = (json.loads(ask(server, f"/jobs/{id}")[2]) for id in ids)
    assert first["state"] == "running"
    assert (second["state"], second["before"], third["state"], third["before"]) == ("waiting", 1, "waiting", 2)
    assert ask(server, f"/jobs/{ids[0]}/video.mp4")[0] == 404
    held.go.set()
    assert [finished(server, id)[-1]["state"] for id in ids] == ["done", "failed", "done"]
    error = json.loads(ask(server, f"/jobs/{ids[1]}")[2])["error"]
    assert error.startswith("MemoryError: out of memory. The terminal") and "Traceback" in capsys.readouterr().err
    assert held.prompts == ["one", "bad", "three"] and ask(server, f"/jobs/{ids[2]}/video.mp4")[2] == b"three"


def test_old_videos_are_removed(folder, held, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_jobs, "KEPT", 2)
    held.go.set()
    with serving(folder / "tiny-teacher", tmp_path / "files") as server:
        ids = []
        for prompt in ("one", "two", "three"):
            ids.append(post(server, prompt=prompt)[1]["id"])
            finished(server, ids[-1])
        assert {path.name for path in (tmp_path / "files").iterdir()} == set(ids[1:])
        status, _, body = ask(server, f"/jobs/{ids[0]}")
        assert status == 404 and "make it again" in json.loads(body)["error"]


def test_closing_ends_what_runs(folder, held, tmp_path):
    jobs = demo_jobs.Jobs(demo.parse(["--model", str(folder / "tiny-teacher")]), tmp_path)
    ids = [jobs.submit({"prompt": prompt}) for prompt in ("one", "two")]
    while not held.prompts:
        time.sleep(0.01)
    made = []
    closing = threading.Thread(target=lambda: made.append(jobs.close()))
    closing.start()
    while jobs.state(ids[1])["state"] == "waiting":
        time.sleep(0.01)
    held.go.set()
    closing.join()
    errors = [jobs.state(id)["error"] for id in ids]
    assert errors[0].startswith("the page was closed before the video") and errors[1].startswith("the page is being")
    assert held.prompts == ["one"] and made == [0]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": " \n"}, "there is no prompt"),
        ({"prompt": 5}, "there is no prompt"),
        ({"prompt": "x" * 2001}, "the prompt has 2001 characters"),
        ({"prompt": "\ud800"}, "the prompt is not valid Unicode"),
        ({"seed": "abc"}, "seed is 'abc': give a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": True}, "seed is True"),
        ({"mode": "other"}, "mode is 'other': this model has monolithic and hybrid"),
        ({"mode": ["hybrid"]}, r"mode is \['hybrid'\]"),
        ({"steps": [1, 1]}, r"steps is \[1, 1\]: give 3 whole numbers from 1 to 100, as 1, 1, 1"),
        ({"steps": [1, 1, 101]}, r"steps is \[1, 1, 101\]"),
        ({"first_steps": "2"}, "first_steps is '2'"),
        ({"mode": "hybrid"}, "choose an image, or another mode"),
        ({"super_resolution": True}, "this model has no super-resolution"),
        ({"super_resolution": 1}, "super_resolution is 1"),
        ({"image": "AAAA"}, "mode monolithic takes no image"),
        ({"file": "/etc/passwd"}, "'file' is unknown"),
    ],
)
def test_bad_requests(server, values, message):
    status, answer = post(server, **{"prompt": PROMPT} | values)
    assert status == 400
    with pytest.raises(UserError, match=message):
        raise UserError(answer["error"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "choose a PNG, JPEG or WebP file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "choose a PNG, JPEG or WebP file"),
        (png(20, 10)[:-60], "choose a PNG, JPEG or WebP file"),
        (png(4097, 1), "at most 10 MB and 4096 pixels a side"),
        (b"\0" * (demo_jobs.IMAGE_BYTES + 3), "at most 10 MB"),
    ],
)
def test_bad_images(server, data, message):
    status, answer = post(server, prompt=PROMPT, mode="hybrid", image=base64.b64encode(data).decode())
    assert status == 400 and message in answer["error"]


def test_an_image_is_the_first_frame(folder, hybrid_about, tmp_path):
    """Up to the parts, which the command makes videos with."""
    values = {"prompt": PROMPT, "image": base64.b64encode(png(20, 10)).decode(), "super_resolution": False}
    request = demo_jobs.read_request(values, hybrid_about)
    assert request.image.shape == (10, 20, 3)
    jobs = demo_jobs.Jobs(demo.parse(["--model", str(folder / "tiny")]), tmp_path)
    args, parts = jobs._prepare("job", request)
    assert parts.image.shape == (64, 64, 3) and parts.first_frame is None and parts.super_resolution == "off"
    assert args.image.parent == tmp_path / "job"
    args, parts = jobs._prepare("other", demo_jobs.read_request({"prompt": PROMPT}, hybrid_about))
    assert parts.image is None and parts.first_frame is not None and parts.super_resolution == "on"
    for image in (5, "not base64!"):
        with pytest.raises(UserError, match="cannot be read"):
            demo_jobs.read_request({"prompt": PROMPT, "image": image}, hybrid_about)


PATHS = ("/absent", "/favicon.ico", "/../demo.py", "/..%2f..%2fetc/passwd", "/jobs/../../etc/passwd", "//etc/passwd")


@pytest.mark.parametrize("path", [*PATHS, "/jobs/" + "0" * 16, "/jobs/" + "0" * 16 + "/video.mp4", "/jobs/0/video.mp4"])
def test_unknown_paths(server, path):
    status, headers, body = ask(server, path)
    assert status == 404 and headers["Content-Type"] == "application/json" and json.loads(body)["error"]


def test_requests_that_are_none(server):
    for body in ("", "{", "{}", "[]", "[" * 100_000, b"\xff"):
        assert ask(server, "/jobs", body)[0] == 400
    assert ask(server, "/absent", "{}")[0] == 404
    assert ask(server, "/jobs", "{}", Content_Type="text/plain")[0] == 415
    assert ask(server, "/jobs", method="POST", Content_Length="many")[0] == 411
    assert ask(server, "/jobs", method="PUT")[0] == 405
    status, _, body = ask(server, "/jobs", b"0" * (demo.BODY_BYTES + 1))
    assert status == 413 and "send an image of at most 10 MB" in json.loads(body)["error"]


def test_other_names_than_this_machines(server):
    """A site that made its name lead here would read what the page says."""
    for name, status in (("localhost:1", 200), ("127.0.0.1", 200), ("evil.example", 403), ("[", 403)):
        assert ask(server, "/model", Host=name)[0] == status


def test_commands_that_cannot_serve(server, folder, tmp_path):
    model, port = str(folder / "tiny-teacher"), str(server.server_address[1])
    with pytest.raises(UserError, match=rf"127\.0\.0\.1, port {port}: cannot be listened on .*choose another --port"):
        demo.main(["--model", model, "--port", port])
    with pytest.raises(UserError, match="absent: no such folder"):
        demo.main(["--model", str(tmp_path / "absent")])
    with pytest.raises(SystemExit):
        demo.parse(["--model", model, "--port", "65536"])


# --- the command, and a browser ---------------------------------------------------------------------------------------


def test_ctrl_c_ends_it(folder, tmp_path):
    command = [sys.executable, "-m", "experiments.demo", "--model", folder / "tiny-teacher", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([str(word) for word in command], env=environment, **pipes) as process:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line and list(tmp_path.glob("nd_jax_demo_*"))
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "0 videos made" in rest and not errors
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium is installed")
    with Browser(find_chromium(), tmp_path_factory.mktemp("browser")) as browser:
        yield browser


ERROR = "!document.getElementById('error').hidden && document.getElementById('error').textContent"
CLICK = "document.getElementById('go').click()"
VIDEO_WIDTH = "document.readyState === 'complete' && document.getElementById('video').videoWidth"


def open_page(browser, server):
    browser.open(server.address)
    browser.until("!document.getElementById('go').disabled")


def fill(browser, **values):
    for name, text in values.items():
        browser.run(f"document.getElementById({name!r}).value = {json.dumps(text)}")


def test_the_page_in_a_browser(server, browser):
    open_page(browser, server)
    browser.run(CLICK)
    assert browser.until(ERROR) == "there is no prompt: say in words what the video shows"
    fill(browser, prompt=PROMPT, seed="x")
    browser.run(CLICK)
    browser.until(f"({ERROR} || '').startsWith('seed is')")
    fill(browser, seed="5")
    browser.run(CLICK)
    assert browser.until(VIDEO_WIDTH) == 64
    video = "(() => { const v = document.getElementById('video'); return [v.loop, v.duration, v.className]; })()"
    assert browser.run(video) == [True, 9 / 8, "small"]
    assert browser.run("document.getElementById('caption').textContent") == PROMPT
    rows = "[...document.querySelectorAll('#seconds th')].map((cell) => cell.textContent)"
    assert browser.run(rows) == ["text", "transformer", "decoder"]
    for width in (1280, 390):
        browser.resize(width, 900)
        # Nothing stands out to the side; a scroll bar takes a part of the window.
        assert browser.run("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
    browser.call("Page.reload")
    assert browser.until(VIDEO_WIDTH) == 64


def test_an_image_chosen_in_a_browser(server, browser, held, tmp_path):
    """What arrives is the file; and what is no video says so."""
    (tmp_path / "first.png").write_bytes(png(20, 10))
    held.go.set()
    open_page(browser, server)
    fill(browser, prompt=PROMPT, mode="hybrid")
    browser.run("document.getElementById('mode').dispatchEvent(new Event('change'))")
    assert browser.run("[...document.querySelectorAll('#image-field, #first-field')].map((e) => e.hidden)") == [
        True,
        False,
    ]
    browser.run(CLICK)
    browser.until(f"({ERROR} || '').includes('choose an image')")
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=document, selector="#image")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "first.png")])
    browser.run(CLICK)
    assert "does not play the video" in browser.until(
        f"{ERROR} && !document.getElementById('result').hidden && {ERROR}"
    )
    np.testing.assert_array_equal(held.parts.image, read_image(tmp_path / "first.png", 64, 64))
