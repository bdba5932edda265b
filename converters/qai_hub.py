"""Compiles an ONNX graph on Qualcomm AI Hub and times it there on a device that exists.

    pip install qai-hub
    qai-hub configure --api_token TOKEN           # from the settings of an account at https://workbench.aihub.qualcomm.com
    python -m converters.qai_hub --onnx FILE --soc 8-elite --profile --output DIR

Optional: nothing else here needs the package, an account or a network. The graph and its weights are uploaded. Written
against qai-hub 0.56; its attribute `soc-model` of a device is the number that `converters.hexagon` has for the chip.
"""

import argparse
import collections
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from converters import hexagon
from converters.output_files import replacing_files, write_json
from converters.packages import need
from nd_jax.errors import UserError, first_line, run_command

TARGET = "--target_runtime qnn_context_binary"
REMEDY = (
    "run: qai-hub configure --api_token TOKEN, with the token of your account at https://workbench.aihub.qualcomm.com"
)


def connect() -> Any:
    """A client of the service; nothing is sent yet.

    Raises:
      UserError: the package is not installed, or it has no token.
    """
    need("qai_hub")
    import qai_hub

    client = qai_hub.Client()
    try:
        _ = client.config
    except qai_hub.UserError as error:
        raise UserError(f"Qualcomm AI Hub: no token ({first_line(error)}); {REMEDY}") from error
    return client


def run_in_cloud(
    onnx_path: str | Path,
    output_dir: str | Path,
    soc: str,
    client: Any,
    profile: bool = False,
    device: str = "",
    options: str = "",
) -> dict[str, Any]:
    """Compiles a graph for a device of the service, and with `profile` runs it there.

    Args:
      onnx_path: the graph, float32 or of `converters.quantize`; external data beside it.
      output_dir: created if needed. NAME_SOC_cloud.json and the binary appear there together.
      soc: a name of `hexagon.SOC_MODELS`.
      client: of `connect`; any object with `get_devices`, `submit_compile_job` and `submit_inference_job`.
      profile: also run the binary on the device, with random inputs.
      device: a device's exact name; by default the first that the service lists with this chip.
      options: further compile options of the service.

    Returns:
      The report, as in the JSON. `compile["status"]` and `profile["status"]` are the service's, SUCCESS or FAILED, and
      there is a `binary` after a success. `profile["result"]` is what the device measured: `execution_summary`
      (microseconds, bytes), `execution_detail` per layer.

    Raises:
      UserError: no such file, unknown chip, no such device, or the service refuses or cannot be reached.
    """
    onnx_path = Path(onnx_path)
    number = hexagon.soc_model(soc)
    if not onnx_path.is_file():
        raise UserError(f"{onnx_path}: no such file; export one with converters.export_onnx")
    name = f"{onnx_path.stem}_{soc}_cloud"
    with replacing_files(Path(output_dir), f"{name}.json") as folder, _service():
        found = _find_device(client, soc, number, device)
        options = f"{TARGET} {options}".strip()
        with _upload_folder(onnx_path, folder) as upload:
            job = client.submit_compile_job(model=str(upload), device=found, name=name, options=options)
        report = {
            "onnx": onnx_path.name,
            "soc": soc,
            "soc_model": number,
            "device": {"name": found.name, "os": found.os, "attributes": list(found.attributes)},
            "compile": {**_finished(job), "options": options},
        }
        if report["compile"]["status"] == "SUCCESS":
            target = job.get_target_model()
            binary = Path(target.download(str(folder / f"{name}.bin")))
            report |= {"binary": binary.name, "binary_bytes": binary.stat().st_size}
            if profile:
                job = client.submit_inference_job(model=target, device=found, inputs=None, profile=True, name=name)
                report["profile"] = _finished(job)
                if report["profile"]["status"] == "SUCCESS":
                    report["profile"]["result"] = job.download_profile()
        write_json(folder / f"{name}.json", report)
    return report


@contextlib.contextmanager
def _service() -> Iterator[None]:
    """The service's errors as one line; what its client prints goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        # The package has no common base: errors of its API and of its client are classes of different modules.
        if type(error).__module__.partition(".")[0] != "qai_hub":
            raise
        raise UserError(f"Qualcomm AI Hub: {first_line(error)}; try again later, or {REMEDY}") from error


def _find_device(client: Any, soc: str, number: int, name: str) -> Any:
    attributes = [f"soc-model:{number}", "framework:qnn"]
    devices = client.get_devices(name=name, attributes=attributes)
    if not devices:
        named = f"called {name!r} " if name else ""
        raise UserError(
            f"Qualcomm AI Hub has no device {named}with the chip {soc} ({', '.join(attributes)}); "
            "choose another --soc or --device, see: qai-hub list-devices"
        )
    return devices[0]


@contextlib.contextmanager
def _upload_folder(onnx_path: Path, parent: Path) -> Iterator[Path]:
    """A folder with the graph and its external data and nothing else, as the service takes them."""
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        folder = Path(scratch) / onnx_path.stem
        folder.mkdir()
        for path in (onnx_path, onnx_path.with_name(f"{onnx_path.name}.data")):
            if path.is_file():
                try:
                    os.link(path, folder / path.name)  # Gigabytes need not be there twice.
                except OSError:
                    shutil.copyfile(path, folder / path.name)
        yield folder


def _finished(job: Any) -> dict[str, Any]:
    status = job.wait()
    return {"job": job.job_id, "url": job.url, "status": status.code, "message": status.message}


def summary(report: dict[str, Any]) -> str:
    """The report in a line."""
    text = f"compiled {report['onnx']} for {report['device']['name']}: {report['binary_bytes'] / 1e6:.1f} MB"
    result = report.get("profile", {}).get("result")
    if result:
        measured = result["execution_summary"]
        units = collections.Counter(layer["compute_unit"] for layer in result["execution_detail"])
        text += f", {measured['estimated_inference_time'] / 1e3:.2f} ms a call on the device"
        if measured["estimated_inference_peak_memory"] is not None:
            text += f", peak memory {measured['estimated_inference_peak_memory'] / 1e6:.0f} MB"
        text += ", layers " + ", ".join(f"{unit} {count}" for unit, count in sorted(units.items()))
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.qai_hub",
        description="Compiles an ONNX graph on Qualcomm AI Hub, and runs it there on a device. Uploads the graph.",
        allow_abbrev=False,
    )
    parser.add_argument("--onnx", type=Path, required=True, help="graph from converters.export_onnx or .quantize")
    parser.add_argument("--output", type=Path, required=True, help="folder for the binary and the report")
    parser.add_argument("--soc", required=True, help=f"one of {', '.join(hexagon.SOC_MODELS)}")
    parser.add_argument("--profile", action="store_true", help="also run the binary on the device and report its time")
    parser.add_argument(
        "--device", default="", metavar="NAME", help="a device of the service (default any of the chip)"
    )
    parser.add_argument("--options", default="", metavar="TEXT", help=f"compile options, put behind {TARGET}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    hexagon.soc_model(args.soc)
    report = run_in_cloud(args.onnx, args.output, args.soc, connect(), args.profile, args.device, args.options)
    for step in ("compile", "profile"):
        job = report.get(step, {"status": "SUCCESS"})
        if job["status"] != "SUCCESS":
            raise UserError(f"{step} of {args.onnx.name} ended as {job['status']}: {job['message']}; see {job['url']}")
    print(f"{summary(report)}: {args.output / report['binary']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
