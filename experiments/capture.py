"""Real inputs of every graph for the device, from the videos of `experiments.generate`: to calibrate and to measure on.

    CAPTURE/GRAPH/PLACE_ROW_call_K.npz   an array for every input of the graph (converters/samples.py)
    CAPTURE/capture.json                 settings, prompts, and where every sample is from

The videos are computed once more, in float32, by the code that runs on a phone (`converters.bundle_host`) with the Flax
model of each graph in the place of the graph: padded envelopes, histories, masks, rotary tables and decoder states are
those that the device will see. Which calls are kept is drawn from the seed, spread over prompts and over the calls of a
prompt (units, steps, branches of guidance). PLACE is a random order, so that the first files of a folder are a fair
choice. Parts of the pipeline follow one another over all prompts, and a kept call is written when it happens.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import bundle_host
from converters.bundle import build_graph, host_weights, load_components
from converters.bundle_host import Noise, OpenGraph
from converters.bundle_manifest import manifest, stage_arrays
from converters.graph import Graph, GraphOptions
from converters.graph_sizes import folder_sizes
from converters.output_files import write_json
from converters.progress import stages
from converters.run_hexagon import draw_noise
from nd_jax.errors import UserError
from nd_jax.files import new_folder
from nd_jax.generate.first_frame import has_first_frame, open_first_frame
from nd_jax.generate.model_folder import ModelFolder
from nd_jax.generate.parts import open_tokenizer
from nd_jax.generate.super_resolution import has_super_resolution
from nd_jax.generate.videos import to_first_frame
from nd_jax.weights.sources import read_json
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE

SUMMARY = "capture.json"
SAMPLES = 32
NEGATIVE = "negative"

Call = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def capture_samples(
    model: ModelFolder,
    prompts: Mapping[int, str],
    output: Path,
    count: int = SAMPLES,
    seed: int = 0,
    image: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes samples of all graphs of a model folder in its mode.

    Args:
      model: the folder and its settings; they decide about the shapes.
      prompts: id, which decides about the noise, -> text. Where there are more than `count`, some are drawn.
      output: the folder to make.
      count: samples per graph, or all calls where there are fewer.
      seed: of the videos' noise, and of the choice.
      image: float32 [H, W, 3] in [-1, 1], the first frame in mode "hybrid"; by default one of each prompt.
      settings: for capture.json.

    Returns:
      Graph -> number of samples. A decoder that is no graph (Pyramid-Flow's own) and what follows it are left out.

    Raises:
      UserError: `output` is in use, a full disk, damaged weights.
    """
    ids = sorted(prompts)
    if len(ids) > count:
        ids = sorted(np.random.default_rng(seed).choice(ids, count, replace=False).tolist())
    with new_folder(output) as folder, stages(14) as begin:
        run = _Run(model, [prompts[id] for id in ids], ids, image, seed, Recorder(folder, count, seed), begin)
        run.all_parts()
        report = {
            "settings": dict(settings or {}),
            "samples": count,
            "prompts": {str(id): prompts[id] for id in ids},
            "graphs": run.recorder.written,
        }
        write_json(folder / SUMMARY, report)
    return {name: len(samples) for name, samples in run.recorder.written.items()}


def is_captured(output: Path, count: int, settings: Mapping[str, Any]) -> bool:
    """Whether a folder has these samples already.

    Raises:
      UserError: it has something else.
    """
    if not output.exists() or not any(output.iterdir()):
        return False
    found = read_json(output / SUMMARY) if (output / SUMMARY).is_file() else {}
    if found.get("settings") != settings or found.get("samples") != count:
        raise UserError(f"{output}: exists and is of other settings; remove it or choose another --capture")
    return True


# --- which calls ------------------------------------------------------------------------------------------------------


def choose_calls(rows: int, calls: int, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(row, call) of `count` different ones of rows x calls, in random order.

    Every row has as many as any other, or one more. Within a row they are spread over its calls, and from row to row
    they are shifted, so that few samples of many rows are spread over the calls as well.

    Raises:
      ValueError: there are fewer.
    """
    if not 0 < count <= rows * calls:
        raise ValueError(f"{count} of {rows} x {calls} calls")
    shift = (rng.permutation(rows) + rng.random(rows)) / rows
    chosen = []
    for place, row in enumerate(rng.permutation(rows)):
        share = count // rows + (place < count % rows)
        if share:
            parts = np.array_split(np.arange(calls), share)
            chosen += [(int(row), int(part[int(shift[row] * len(part))])) for part in parts]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def calls_per_row(model: Mapping[str, Any]) -> Mapping[str, int]:
    """Graph -> its calls for a prompt, by `model.json`; text graphs and those of one picture have 1."""
    sampler, video = model["sampler"], model["video"]
    units = [sampler["later"] if unit else sampler["first"] for unit in range(sampler["first_unit"], sampler["units"])]
    branches = [1 if unit["guidance"] is None else 2 for unit in units]
    counts = collections.defaultdict(lambda: 1)
    for stage in range(video["stages"]):
        steps = [len(unit["stages"][stage]["timesteps"]) for unit in units]
        counts[f"mmdit_stage{stage}"] = sum(n * each for n, each in zip(steps, branches, strict=True))
    counts["decoder_stream"], counts["quicksrnet"] = video["latent_frames"], video["frames"]
    if model["first_frame"]:
        counts["unet"] = len(model["first_frame"]["steps"])
    return counts


class Recorder:
    """Writes the chosen calls of graphs.

    Args:
      folder: gets a folder per graph.
      count: samples per graph, or all calls where there are fewer.
      seed: of the choice.

    Attributes:
      written: graph -> {"file", "row", "call"} of every sample, by place.
    """

    def __init__(self, folder: Path, count: int, seed: int):
        self.written: dict[str, list[dict[str, Any]]] = {}
        self._folder, self._count, self._rng = folder, count, np.random.default_rng((seed, 1))

    def rows(self, name: str, call: Call, labels: Sequence[str], calls: int) -> list[Call]:
        """The graph `call` once per row; what is called as a row's counts as its.

        Args:
          name: of the graph.
          call: the graph.
          labels: of the rows, for the files' names.
          calls: that every row will make.
        """
        chosen = choose_calls(len(labels), calls, min(self._count, len(labels) * calls), self._rng)
        places = {key: place for place, key in enumerate(chosen)}
        self.written[name] = [
            {"file": f"{place:04}_{labels[row]}_call_{number:04}.npz", "row": labels[row], "call": number}
            for place, (row, number) in enumerate(chosen)
        ]
        (self._folder / name).mkdir()

        def of(row: int) -> Call:
            made = iter(range(calls))

            def recorded(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
                place = places.get((row, next(made)))
                if place is not None:
                    np.savez(self._folder / name / self.written[name][place]["file"], **inputs)
                return call(inputs)

            return recorded

        return [of(row) for row in range(len(labels))]


# --- the pipeline -----------------------------------------------------------------------------------------------------


def jax_call(graph: Graph) -> Call:
    """The model that a graph must agree with, as a call of the graph."""
    inputs, outputs = [spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs]
    reference = graph.reference  # Not the graph, whose rearranged parameters need not stay.
    return lambda given: dict(zip(outputs, map(np.asarray, reference(*(given[name] for name in inputs))), strict=True))


class _Run:
    """The pipeline over all prompts, part by part; weights of a part are there while it runs."""

    def __init__(
        self,
        model: ModelFolder,
        texts: Sequence[str],
        ids: Sequence[int],
        image: np.ndarray | None,
        seed: int,
        recorder: Recorder,
        begin: Callable[[str], None],
    ):
        drawn = model.mode == "hybrid" and image is None and has_first_frame(model.root)
        first = open_first_frame(model.root) if drawn else None
        self.model, self.image, self.seed, self.recorder, self.begin = model, image, seed, recorder, begin
        self.texts, self.ids = [text + model.settings.prompt_modifier for text in texts], ids
        self.labels = [f"prompt_{id:05}" for id in ids]
        self.entry = manifest(model, first, {})
        self.arrays = stage_arrays(model)
        self.tokenizers = {
            name: open_tokenizer(model.root / entry["folder"], entry["vocab_size"], entry["length"])
            for name, entry in self.entry["tokenizers"].items()
        }
        self.options = GraphOptions(residual_scale="none", **folder_sizes(model.root, model.settings))
        self.calls = calls_per_row(self.entry)

    def all_parts(self) -> None:
        firsts = self.first_latents() if self.entry["mode"] == "hybrid" else [None] * len(self.texts)
        latents = self.rollouts(firsts)
        if self.model.vae_network.name == ASYMMETRIC_VIDEO_VAE.name:
            self.frames(latents)
        else:
            print(f"{self.model.path('vae')}: its decoder is no graph (docs/decoder.md), so there are no samples of it")

    def open(self, *names: str, labels: Sequence[str]) -> list[OpenGraph]:
        """The graphs of a part, once per row."""
        loaded, opened = {}, {}
        for name in names:
            self.begin(name)
            loaded = load_components(self.model, name, loaded)
            self.arrays |= host_weights(loaded)
            graph = build_graph(name, loaded, self.options)
            ends = {part: [dataclasses.asdict(spec) for spec in getattr(graph, part)] for part in ("inputs", "outputs")}
            self.entry["graphs"][name] = ends | {"carried": dict(graph.carried)}
            opened[name] = self.recorder.rows(name, jax_call(graph), labels, self.calls[name])
            del graph
        return [lambda name, row=row: opened[name][row] for row in range(len(labels))]

    def noise(self, row: int) -> Noise:
        return draw_noise(self.entry, self.seed, self.ids[row])

    def pictures(self) -> list[np.ndarray]:
        """The first frame of every prompt, float32 [H, W, 3] at the size of the video."""
        entry, video = self.entry, self.entry["video"]
        opened = self.open("first_frame_clip_l", "first_frame_clip_g", labels=self.labels)
        encode = lambda call, text: bundle_host.encode_picture_texts(entry, self.tokenizers, call, [text])[0]
        texts = [encode(call, text) for call, text in zip(opened, self.texts, strict=True)]
        del opened  # Before the next part is loaded.
        opened = self.open("unet", labels=self.labels)
        latents = [
            bundle_host.denoise_picture(entry, self.arrays, call, texts[row], self.noise(row).picture)
            for row, call in enumerate(opened)
        ]
        del opened
        opened = self.open("image_decoder", labels=self.labels)
        pictures = (bundle_host.decode_picture(entry, call, z) for call, z in zip(opened, latents, strict=True))
        return [to_first_frame(picture, video["height"], video["width"]) for picture in pictures]

    def first_latents(self) -> list[np.ndarray]:
        images = self.pictures() if self.image is None else [self.image] * len(self.texts)
        opened = self.open("vae_encoder", labels=self.labels)
        return [
            bundle_host.first_latent(self.entry, call, images[row], self.noise(row).posterior)
            for row, call in enumerate(opened)
        ]

    def rollouts(self, firsts: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Latents of every prompt."""
        entry = self.entry
        guided = any(part and part["guidance"] for part in (entry["sampler"]["first"], entry["sampler"]["later"]))
        texts = [*self.texts, *([entry["negative_prompt"]] if guided else [])]
        labels = [*self.labels, *([NEGATIVE] if guided else [])]
        opened = self.open(entry["text_graph"], "clip_l", "clip_g", labels=labels)
        encode = lambda call, text: bundle_host.encode_texts(entry, self.tokenizers, call, [text])[0]
        texts = [encode(call, text) for call, text in zip(opened, texts, strict=True)]
        del opened
        negative = texts[-1] if guided else None
        stages = [f"mmdit_stage{stage}" for stage in range(entry["video"]["stages"])]
        return [
            bundle_host.rollout(entry, self.arrays, call, texts[row], negative, self.noise(row), firsts[row])
            for row, call in enumerate(self.open(*stages, labels=self.labels))
        ]

    def frames(self, latents: Sequence[np.ndarray]) -> None:
        large = ["quicksrnet"] if has_super_resolution(self.model.root) else []
        for z, call in zip(latents, self.open("decoder_stream", *large, labels=self.labels), strict=True):
            frames = bundle_host.decode(self.entry, call, z)
            collections.deque(bundle_host.enlarge(call, frames) if large else frames, maxlen=0)
