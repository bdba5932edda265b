"""A video from a bundle of `converters.bundle`, through onnxruntime and without the model folder.

    python -m converters.run_hexagon --bundle BUNDLE --prompt TEXT --output video.mp4
    python -m converters.run_hexagon --bundle BUNDLE --prompt TEXT --output video.mp4 --compare MODEL_DIR

Graphs run on the processor or, with --simulator CHIP, compiled on the HTP simulator: those of float32 in FP16, those
that `converters.bundle --precision w8a16` quantised in W8A16. Noise is that of `experiments.generate` for the first
prompt of a file, so that the same seed gives the same video; --compare makes that one with JAX.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import chain, hexagon, qdq
from converters.bundle_host import Arrays, Noise, OpenGraph, make_frames
from converters.bundle_manifest import bundle_path, read_manifest
from converters.output_files import write_json
from converters.packages import need
from converters.samples import read_model
from nd_jax.errors import UserError, run_command
from nd_jax.generate.videos import read_picture, to_first_frame, to_picture, write_video

PROMPT_ID = 0


# --- graphs -----------------------------------------------------------------------------------------------------------


def graph_opener(bundle: Path, model: dict[str, Any], soc: str | None = None, scratch: Path | None = None) -> OpenGraph:
    """Opens graphs of a bundle by name; a call takes and gives float32 where the graph has integers for it.

    Args:
      bundle: the folder.
      model: its `model.json`.
      soc: a chip of `hexagon.SOC_MODELS`, for the simulator; the CPU provider without.
      scratch: a folder for binaries, with `soc`.

    Raises:
      UserError: (when called) no such graph, a damaged one, inputs that do not fit it.
    """

    def open_graph(name: str) -> Callable[[Arrays], dict[str, np.ndarray]]:
        if name not in model["graphs"]:
            raise UserError(f"{bundle}: the bundle has no graph {name}, which mode {model['mode']} needs here")
        entry = model["graphs"][name]
        path = bundle_path(bundle, entry["file"], f"graph {name}")
        proto = read_model(path)
        for tensor in proto.graph.initializer:
            for location in (item.value for item in tensor.external_data if item.key == "location"):
                bundle_path(path.parent, location, f"a weight of graph {name}")
        encodings = qdq.encodings(proto)
        run = _on_cpu(path) if soc is None else _on_simulator(path, soc, scratch)

        def call(inputs: Arrays) -> dict[str, np.ndarray]:
            for spec in entry["inputs"]:
                found = inputs.get(spec["name"])
                if found is None or list(found.shape) != list(spec["shape"]) or found.dtype != spec["dtype"]:
                    got = None if found is None else f"{found.dtype} {list(found.shape)}"
                    raise UserError(
                        f"{path}: input {spec['name']!r} is {spec['dtype']} {list(spec['shape'])} and the host has "
                        f"{got}: model.json is of another bundle"
                    )
            return qdq.to_floats(run(qdq.to_integers(inputs, encodings)), encodings)

        return call

    return open_graph


def _on_cpu(path: Path) -> Callable[[Arrays], dict[str, np.ndarray]]:
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # As in `onnx_check`: float weights between rounded activations stay float.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes have no common base
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: onnxruntime does not load it ({reason}); make the bundle again") from error
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> dict[str, np.ndarray]:
        inputs = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        return dict(zip(names, session.run(names, inputs), strict=True))

    return run


def _on_simulator(path: Path, soc: str, scratch: Path) -> Callable[[Arrays], dict[str, np.ndarray]]:
    wrapper = hexagon.compile_binary(path, scratch / f"{path.stem}_{soc}.onnx", soc).wrapper
    return lambda inputs: hexagon.run_on_simulator(wrapper, soc, [dict(inputs)]).outputs[0]


# --- the video --------------------------------------------------------------------------------------------------------


def draw_noise(model: dict[str, Any], seed: int, prompt_id: int = PROMPT_ID) -> Noise:
    """The noise of `experiments.generate` for a prompt, whatever the bundle's numbers of steps."""
    import jax

    from nd_jax.generate import first_frame, sampler
    from nd_jax.generate.config import SamplerConfig
    from nd_jax.pyramid.layout import VideoSize
    from nd_jax.pyramid.schedule import PyramidSchedule

    video, channels = model["video"], model["video"]["latent_channels"]
    size = VideoSize(video["latent_frames"], video["latent_height"], video["latent_width"], video["stages"])
    steps = (1,) * size.stages
    schedule = PyramidSchedule(size.stages, model["sampler"]["gamma"])
    config = SamplerConfig(size, "monolithic", first_steps=steps, steps=steps, schedule=schedule)
    key = sampler.prompt_keys(seed, np.array([prompt_id]))
    streams = jax.vmap(jax.random.split)(key)
    noise = sampler.draw_noise(streams[:, 0], config, channels)
    posterior = jax.random.normal(streams[0, 1], (1, size.height, size.width, channels), np.float32)
    picture = None
    if model["first_frame"]:
        picture_key = jax.vmap(jax.random.fold_in, (0, None))(key, first_frame.NOISE_STREAM)
        picture = np.asarray(first_frame.draw_noise(picture_key, tuple(model["first_frame"]["latents"])))[0]
    return Noise(
        np.asarray(noise.initial)[0],
        tuple(np.asarray(jump)[0] for jump in noise.jumps),
        np.asarray(posterior)[0],
        picture,
    )


def bundle_frames(
    bundle: Path,
    prompt: str,
    seed: int = 0,
    image: Path | None = None,
    soc: str | None = None,
    model: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] of a prompt.

    Args:
      bundle: the folder.
      prompt: any text.
      seed: of all noise.
      image: a picture file, the first frame, in mode "hybrid".
      soc: a chip, to run on the HTP simulator; the CPU provider without.
      model: its `model.json`, if it was read already.

    Raises:
      UserError: a damaged bundle, an image that the mode does not take or lacks, a missing package.
    """
    from nd_jax.data.tokenizers import Tokenize, load_tokenizer
    from nd_jax.weights.safetensors_io import SafetensorsFile

    need("onnx", "onnxruntime")
    model = model or read_manifest(bundle)
    if soc is not None:
        hexagon.soc_model(soc)
        hexagon.require_compiler()
    _check_image(model, image, bundle)
    tokenizers = {
        name: Tokenize(load_tokenizer(bundle_path(bundle, entry["folder"], f"tokenizer of {name}")), entry["length"])
        for name, entry in model["tokenizers"].items()
    }
    file = SafetensorsFile(bundle_path(bundle, model["host"]["file"], "host arrays"))
    try:
        arrays = {key: file.read(key) for key in file.keys()}
    finally:
        file.close()
    picture = None if image is None else read_picture(image)
    with tempfile.TemporaryDirectory() as scratch:
        opener = chain.opener(graph_opener(bundle, model, soc, Path(scratch)), model["graphs"])
        try:
            return list(make_frames(model, arrays, tokenizers, opener, prompt, draw_noise(model, seed), picture))
        except (KeyError, IndexError) as error:
            raise UserError(f"{bundle}: lacks {error}; make the bundle again with converters.bundle") from error


def _check_image(model: dict[str, Any], image: Path | None, bundle: Path) -> None:
    if image is not None and model["mode"] != "hybrid":
        raise UserError(f"{bundle}: mode {model['mode']} takes no image; leave --image out")
    if image is None and model["mode"] == "hybrid" and not model["first_frame"]:
        raise UserError(f"{bundle}: mode hybrid starts from an image, and the bundle has no unet to make one: --image")


# --- the same by JAX --------------------------------------------------------------------------------------------------


def jax_frames(model_dir: Path, prompt: str, seed: int = 0, image: Path | None = None) -> list[np.ndarray]:
    """The same video by the networks that training uses, in float32."""
    import jax

    from nd_jax.generate import first_frame, pipeline, super_resolution
    from nd_jax.generate.model_folder import open_model

    model, dtype = open_model(model_dir), np.float32
    settings, sampler = model.settings, model.sampler()
    prompt, first = prompt + settings.prompt_modifier, None
    if model.mode == "hybrid":
        if image is None:
            drawn = first_frame.open_first_frame(model_dir)
            size = drawn.picture_size(settings.height, settings.width)
            text = first_frame.encode_prompts(drawn, [prompt], dtype)
            ((latents,),) = first_frame.sample_latents(drawn, text, [PROMPT_ID], seed, size, dtype=dtype)
            picture = to_picture(first_frame.image_decoder(drawn, dtype)(latents))
        else:
            picture = read_picture(image)
        frame = to_first_frame(picture, settings.height, settings.width)
        first = pipeline.encode_first_frames(model, [frame], dtype)
    prompts = [prompt, *([settings.negative_prompt] if sampler.needs_negative else [])]
    text = pipeline.encode_prompts(model, prompts, dtype)
    rows = [jax.tree.map(lambda x, row=row: x[row : row + 1], text) for row in range(len(prompts))]
    negative = rows[1] if sampler.needs_negative else None
    ((latents,),) = pipeline.sample_latents(
        model, rows[0], [PROMPT_ID], seed, negative, first_frames=first, dtype=dtype
    )
    frames = pipeline.video_decoder(model, dtype)(latents)
    if super_resolution.has_super_resolution(model_dir):
        frames = map(super_resolution.upscaler(model_dir), frames)
    return list(frames)


def psnr_db(frames: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """10 log10(255^2 / mean squared difference) over all frames, uint8; `inf` for equal ones.

    Raises:
      UserError: other numbers of frames, or other sizes.
    """
    shapes = [(len(video), *(video[0].shape if video else ())) for video in (frames, others)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the bundle's video is {shapes[0]} and JAX's is {shapes[1]}: they are of unlike models")
    error = float(np.mean(np.square(np.stack(frames).astype(np.float64) - np.stack(others))))
    return 10 * math.log10(255**2 / error) if error else math.inf


# --- command ----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.run_hexagon",
        description="Make a video with the graphs of a bundle, on the processor or the HTP simulator.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--bundle", type=Path, required=True, metavar="DIR", help="of converters.bundle")
    add("--prompt", required=True, metavar="TEXT", help="what the video shows")
    add("--output", type=Path, required=True, metavar="FILE", help="the MP4")
    add("--image", type=Path, metavar="FILE", help="first frame, for mode hybrid (default: made from the prompt)")
    add("--seed", type=int, default=0, help="of all noise (default 0)")
    add("--simulator", metavar="CHIP", help=f"run compiled on the HTP simulator: {', '.join(hexagon.SOC_MODELS)}")
    add("--compare", type=Path, metavar="MODEL_DIR", help="print the PSNR against this model folder's video by JAX")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be from 0 to 4294967295")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args, begin = parse(argv), time.perf_counter()
    model = read_manifest(args.bundle)
    frames = bundle_frames(args.bundle, args.prompt, args.seed, args.image, args.simulator, model)
    seconds = time.perf_counter() - begin
    _write(args.output, frames, model["video"]["frame_rate"])
    height, width = frames[0].shape[:2]
    print(f"{len(frames)} frames of {height} x {width} in {seconds:.1f} s: {args.output}")
    report = {"bundle": str(args.bundle), "simulator": args.simulator, "frames": len(frames), "seconds": seconds}
    if args.compare:
        psnr = psnr_db(frames, jax_frames(args.compare, args.prompt, args.seed, args.image))
        print("equal to the video by JAX" if math.isinf(psnr) else f"{psnr:.1f} dB PSNR against the video by JAX")
        # None for equal frames: JSON has no infinity.
        report["psnr_db"] = None if math.isinf(psnr) else psnr
    write_json(args.output.with_suffix(".json"), report)
    return 0


def _write(path: Path, frames: Iterable[np.ndarray], frame_rate: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created ({error.strerror}); choose another --output") from error
    write_video(path, frames, frame_rate)


if __name__ == "__main__":
    sys.exit(run_command(main))
