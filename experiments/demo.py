"""A page to try a model folder: a prompt and a few choices, the progress of every part, the video and its seconds.

    python -m experiments.demo --model experiments/models/toy_teacher
    python -m experiments.demo --model model --port 8080 --steps 2,2,2

It answers on this machine alone unless --host says otherwise, makes one video at a time, and keeps the last ones in
a temporary folder until it ends. Options stand in the place of the folder's generation.json, as those of
`experiments.generate`.

    GET  /                       demo.html
    GET  /model                  what the folder allows (demo_jobs.describe)
    POST /jobs                   a request (demo_jobs.read_request) -> {"id"}
    GET  /jobs/ID                state, parts and their seconds
    GET  /jobs/ID/video.mp4

A refusal is {"error": what is wrong and what to do}.
"""

import argparse
import ipaddress
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from experiments.demo_jobs import IMAGE_BYTES, Jobs, QueueFull
from experiments.generate import add_prompt_modifier, add_sampling_options
from nd_jax.errors import UserError, run_command

PAGE = Path(__file__).with_name("demo.html")
# An image in base64, and the other values.
BODY_BYTES = IMAGE_BYTES * 4 // 3 + 2**16
JOB_PATH = re.compile(r"/jobs/([0-9a-f]{16})(/video\.mp4)?")
RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; media-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo",
        description="Serve a page to try a model folder.",
        epilog="What is not given comes from generation.json in the model folder, or is that of the released model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder in the released layout")
    add("--port", type=int, default=7860, metavar="N", help="0 for any that is free (default 7860)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1, this machine)")
    add("--safety-frames", type=int, default=1, metavar="N", help="frames that are checked, 0 for none (default 1)")
    add_prompt_modifier(parser)
    add_sampling_options(parser)
    # A request has the other options of experiments.generate, or they make no difference for one video.
    parser.set_defaults(image=None, latents=False, keep_first_frames=False, batch=1, shard=False)
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error("--port must be from 0 to 65535")
    if args.safety_frames < 0:
        parser.error("--safety-frames must be 0 or more")
    return args


class Refusal(Exception):
    """Ends a request with a status and a message."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """The page of some jobs at an address.

    Raises:
      UserError: an address that is not this machine's, or in use.
    """

    def __init__(self, host: str, port: int, jobs: Jobs):
        self.jobs = jobs
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, address = found[0][0], found[0][4]
            super().__init__(address, Handler)
        except OSError as error:
            raise UserError(
                f"{host}, port {port}: cannot be listened on ({error.strerror}); choose another --port or --host"
            ) from error
        ip = self.server_address[0]
        self.local = ipaddress.ip_address(ip).is_loopback
        self.names = {"localhost", host.lower(), ip}
        shown = f"[{ip}]" if ":" in ip else ip
        self.address = f"http://{shown}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection. Nothing of a path becomes the name of a file."""

    server: DemoServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # Seconds that a silent connection is held.
    error_content_type = "text/plain; charset=utf-8"  # Of what the base class refuses.
    error_message_format = "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _refuse_method(self) -> None:
        self.close_connection = True
        self._send_json({"error": f"{self.command} is not answered here"}, HTTPStatus.METHOD_NOT_ALLOWED)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse_method

    def log_message(self, *args: Any) -> None:
        """The page asks twice a second: nothing is logged."""

    def _answer(self, work: Any) -> None:
        try:
            self._check_host()
            work(self.path.partition("?")[0])
        except Refusal as refusal:
            self._send_json({"error": str(refusal)}, refusal.status)

    def _check_host(self) -> None:
        """A page of another site may have its name lead here; a browser then says that name."""
        try:
            name = urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:
            name = None
        if self.server.local and name not in self.server.names:
            self.close_connection = True
            raise Refusal(HTTPStatus.FORBIDDEN, f"this page is at {self.server.address}: open that address")

    def _get(self, path: str) -> None:
        job = JOB_PATH.fullmatch(path)
        if path == "/":
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/model":
            self._send_json(self.server.jobs.about)
        elif job is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is nothing at this address: open {self.server.address}")
        else:
            try:
                if job[2]:
                    self._send_video(self.server.jobs.video(job[1]))
                else:
                    self._send_json(self.server.jobs.state(job[1]))
            except KeyError as error:
                message = "this video is not there, or not any more: make it again"
                raise Refusal(HTTPStatus.NOT_FOUND, message) from error

    def _post(self, path: str) -> None:
        body = self._read_body()
        if path != "/jobs":
            raise Refusal(HTTPStatus.NOT_FOUND, "nothing takes requests at this address: send them to /jobs")
        # Another site's page may send text or a form here without asking, but no JSON.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the request as application/json")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request is not JSON; send an object with a prompt") from error
        try:
            self._send_json({"id": self.server.jobs.submit(values)}, HTTPStatus.ACCEPTED)
        except QueueFull as error:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        except UserError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from error

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,15}", length):
            self.close_connection = True
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is: send Content-Length")
        if int(length) <= BODY_BYTES:
            return self.rfile.read(int(length))
        # A client that is still sending would not see an answer: take in some more, and drop it.
        left = min(int(length), 8 * BODY_BYTES)
        while left > 0 and (data := self.rfile.read(min(left, 2**20))):
            left -= len(data)
        self.close_connection = True
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the request has {int(length):,} bytes: send an image of at most {IMAGE_BYTES // 2**20} MB",
        )

    def _send_video(self, video: bytes) -> None:
        """All of it, or the range that a player asks for."""
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None:
            return self._send(video, "video/mp4", headers={"Accept-Ranges": "bytes"})
        start, end = int(asked[1]), min(int(asked[2] or len(video)), len(video) - 1)
        if start > end:
            status, headers = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{len(video)}"}
            return self._send_json({"error": "the video has no such bytes"}, status, headers)
        headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{end}/{len(video)}"}
        self._send(video[start : end + 1], "video/mp4", HTTPStatus.PARTIAL_CONTENT, headers)

    def _send_json(self, values: Any, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] = HEADERS) -> None:
        self._send(json.dumps(values).encode(), "application/json", status, headers)

    def _send(
        self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] = HEADERS
    ) -> None:
        self.send_response(status)
        for name, value in (HEADERS | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C; returns the exit status; raises UserError."""
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="nd_jax_demo_", ignore_cleanup_errors=True) as folder:
            jobs = Jobs(args, Path(folder))
            with DemoServer(args.host, args.port, jobs) as server:
                try:
                    print(f"{args.model} at {server.address} (Ctrl-C ends)", flush=True)
                    if not server.local:
                        print("everybody who reaches this machine can use it: it asks for no password", flush=True)
                    server.serve_forever()
                except KeyboardInterrupt:
                    print("\nending; a video in the making stops at its next step (Ctrl-C again: at once)", flush=True)
            made = jobs.close()
    except KeyboardInterrupt:
        os._exit(130)  # The thread that computes cannot be interrupted, and Python would wait for it.
    print(f"{made} videos made, and removed with the page")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
