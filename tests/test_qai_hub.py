"""The cloud verb with a client that stands for the service: what is asked, what is written, what is said on failure."""

import dataclasses
import json
import sys

import pytest

from converters import qai_hub
from nd_jax.errors import UserError, run_command

PROFILE = {
    "execution_summary": {"estimated_inference_time": 12_345, "estimated_inference_peak_memory": 67_000_000},
    "execution_detail": [{"name": n, "type": "Conv", "compute_unit": u} for n, u in (("a", "NPU"), ("b", "NPU"))],
}


@dataclasses.dataclass
class Device:
    name: str
    os: str
    attributes: list


@dataclasses.dataclass
class Status:
    code: str
    message: str | None = None


class Job:
    """Of qai-hub, the methods that are called."""

    def __init__(self, name, status, content=b"binary", profile=None):
        self.job_id, self.url, self.status = f"j{name}", f"https://jobs/{name}", status
        self.content, self.profile = content, profile

    def wait(self):
        return self.status

    def get_target_model(self):
        return self

    def download(self, filename):
        print("Downloaded model")  # as the package does
        with open(filename, "wb") as file:
            file.write(self.content)
        return filename

    def download_profile(self):
        return self.profile


class Service(Exception):
    """An error of the package: recognised by where its class is from."""


Service.__module__ = "qai_hub.client"


class Client:
    def __init__(self, compiled="SUCCESS", profiled="SUCCESS", devices=1, error=None):
        self.statuses, self.devices, self.error, self.asked = (compiled, profiled), devices, error, []

    def get_devices(self, name="", os="", attributes=()):
        self.asked.append(("devices", name, tuple(attributes)))
        return [Device(name or "Phone", "15", list(attributes))] * self.devices

    def submit_compile_job(self, model, device, name, options):
        if self.error:
            raise self.error
        from pathlib import Path

        files = {path.name: path.read_bytes() for path in Path(model).iterdir()}
        self.asked.append(("compile", Path(model).name, files, device.name, options))
        return Job("compile", Status(self.statuses[0], "it says why" if self.statuses[0] == "FAILED" else None))

    def submit_inference_job(self, model, device, inputs, profile, name):
        assert inputs is None and profile is True
        self.asked.append(("profile", model.job_id, device.name))
        return Job("profile", Status(self.statuses[1], "out of memory"), profile=PROFILE)


@pytest.fixture
def onnx(tmp_path):
    (tmp_path / "graphs").mkdir()
    for name in ("clip_l.onnx", "clip_l.onnx.data", "other.onnx"):
        (tmp_path / "graphs" / name).write_text(name)
    return tmp_path / "graphs" / "clip_l.onnx"


def command(monkeypatch, client, onnx, output, *more):
    monkeypatch.setattr(qai_hub, "connect", lambda: client)
    arguments = ["--onnx", str(onnx), "--soc", "8-elite", "--output", str(output), *more]
    return run_command(lambda: qai_hub.main(arguments))


def test_compile_and_profile(onnx, tmp_path, monkeypatch, capsys):
    client = Client()
    assert command(monkeypatch, client, onnx, tmp_path / "out", "--profile", "--options", "--x 1") == 0
    files = {"clip_l.onnx": b"clip_l.onnx", "clip_l.onnx.data": b"clip_l.onnx.data"}
    assert client.asked == [
        ("devices", "", ("soc-model:69", "framework:qnn")),
        ("compile", "clip_l", files, "Phone", "--target_runtime qnn_context_binary --x 1"),
        ("profile", "jcompile", "Phone"),
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "clip_l_8-elite_cloud.bin",
        "clip_l_8-elite_cloud.json",
    ]
    assert (tmp_path / "out" / "clip_l_8-elite_cloud.bin").read_bytes() == b"binary"
    report = json.loads((tmp_path / "out" / "clip_l_8-elite_cloud.json").read_text())
    assert report["device"]["name"] == "Phone" and report["binary_bytes"] == 6
    assert report["compile"]["url"] == "https://jobs/compile" and report["profile"]["result"] == PROFILE
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "12.35 ms a call on the device, peak memory 67 MB, layers NPU 2" in out


def test_without_profile_nothing_runs_on_the_device(onnx, tmp_path, monkeypatch, capsys):
    client = Client()
    assert command(monkeypatch, client, onnx, tmp_path / "out", "--device", "Tablet") == 0
    assert [asked[0] for asked in client.asked] == ["devices", "compile"] and client.asked[0][1] == "Tablet"
    assert " ms " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("client", "message", "files"),
    [
        (Client(compiled="FAILED"), "compile of clip_l.onnx ended as FAILED: it says why; see https://jobs", 1),
        (Client(profiled="FAILED"), "profile of clip_l.onnx ended as FAILED: out of memory", 2),
        (Client(devices=0), "no device with the chip 8-elite (soc-model:69", 0),
        (Client(error=Service("Rate limited.\nMore.")), "Qualcomm AI Hub: Rate limited.; try again later", 0),
    ],
    ids=["compile fails", "profile fails", "no device", "refused"],
)
def test_failures_are_one_line_and_keep_what_came_back(onnx, tmp_path, monkeypatch, capsys, client, message, files):
    assert command(monkeypatch, client, onnx, tmp_path / "out", "--profile") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert len(list((tmp_path / "out").iterdir())) == files


def test_errors_of_other_code_are_not_the_services(onnx, tmp_path):
    with pytest.raises(ZeroDivisionError):
        qai_hub.run_in_cloud(onnx, tmp_path / "out", "8-elite", Client(error=ZeroDivisionError()))


def test_bad_input_needs_no_service(tmp_path):
    with pytest.raises(UserError, match="chip '9-elite' is not known"):
        qai_hub.main(["--onnx", "x", "--soc", "9-elite", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="no such file; export one"):
        qai_hub.run_in_cloud(tmp_path / "x.onnx", tmp_path / "out", "8-elite", Client())


def test_without_package_or_token(monkeypatch):
    monkeypatch.setitem(sys.modules, "qai_hub", None)  # as if it were not installed
    with pytest.raises(UserError, match="qai-hub not installed; run: pip install qai-hub"):
        qai_hub.connect()

    class Package:
        UserError = Service

        class Client:
            @property
            def config(self):
                raise Service("Failed to load client configuration file.\n a box of text")

    monkeypatch.setitem(sys.modules, "qai_hub", Package)
    with pytest.raises(UserError, match=r"no token \(Failed to load .*\); run: qai-hub configure --api_token TOKEN"):
        qai_hub.connect()
