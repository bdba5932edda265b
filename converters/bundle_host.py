"""What the host computes around the graphs of a bundle: numpy, `model.json` and the arrays beside it, and no network.

A program on a phone has to do the same. Batches are 1; U(.) repeats values in a 2 x 2 block, Down(.) is its mean:

    c        = silu(MLP_t(sinusoid(t)) + MLP_p(pooled)),   MLP(x) = W_out silu(W_hidden x + b) + b            (1)
    x_0      = (2 Down)^(S - 1) noise,  S stages;   x_i = alpha_i U(x_{i-1}) + beta_i n_i                     (2)
    history  = bank[index[unit]],  bank = [0 | tokens of z_0 | ... | tokens of z_i],  z: pyramid of latents   (3)
    mask     = 0 where time(query) >= time(key) and group(query) = group(key), else `masked_logit`           (4)
    x       <- x + (sigma_{k+1} - sigma_k) v,   v = v- + g (v+ - v-) with guidance                            (5)
    x       <- next_signal (c_skip x + c_out (x - noise e) / signal) + next_noise z    first frame, per step  (6)
    z_0      = (mean + exp(logvar / 2) noise - shift_0) scale_0                        first latent frame     (7)
    frames   = decoder(z / scale + shift, states),  shift and scale of latent frame 0 or of the others        (8)

Equations 2 to 5 are those of `nd_jax.generate.sampler`, where they have names and sources; (1) and (4) those of
`nd_jax.generate.stage_inputs`. Every random number is an argument.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nd_jax.generate.videos import to_first_frame, to_picture, to_uint8, to_unit

Arrays = Mapping[str, np.ndarray]
# Graph name -> a function from inputs to outputs by name. The graph lives as long as the function.
OpenGraph = Callable[[str], Callable[[Arrays], dict[str, np.ndarray]]]
# Text -> {"ids": int32 [L], "mask": int32 [L]}.
Tokenizers = Mapping[str, Callable[[str], dict[str, np.ndarray]]]


class Noise(NamedTuple):
    """Everything random about a video, float32.

    Attributes:
      initial: white, [T, h, w, C].
      jumps: block noise of stages 1, 2, ..., [T, h_i, w_i, C] each: sqrt(1 + gamma) (w - m) + sqrt(1 - 3 gamma) m for
        white w with the mean m over its 2 x 2 block.
      posterior: white, [h, w, C], of equation 7.
      picture: white, [steps + 1, h, w, C], of the first frame's picture; None without one.
    """

    initial: np.ndarray
    jumps: tuple[np.ndarray, ...]
    posterior: np.ndarray
    picture: np.ndarray | None = None


class Text(NamedTuple):
    """What the transformer is told: `context` [1, T, E], `mask` [1, T], `pooled` [1, P]."""

    context: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


def make_frames(
    model: Mapping[str, Any],
    arrays: Arrays,
    tokenizers: Tokenizers,
    open_graph: OpenGraph,
    prompt: str,
    noise: Noise,
    picture: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """A prompt's video, frame by frame: uint8 [H, W, 3].

    Args:
      model: `model.json`.
      arrays: of the file that it names under "host".
      tokenizers: by the name of the graph that takes their ids.
      open_graph: opens a graph of the bundle.
      prompt: any text.
      noise: everything random.
      picture: uint8 [h, w, 3] of any size, the first frame in mode "hybrid"; made from the prompt without one.
    """
    prompt, video, first = prompt + model["prompt_modifier"], model["video"], None
    guided = any(part and part["guidance"] for part in (model["sampler"]["first"], model["sampler"]["later"]))
    if model["mode"] == "hybrid":
        if picture is None:
            picture = draw_picture(model, arrays, tokenizers, open_graph, prompt, noise.picture)
        image = to_first_frame(picture, video["height"], video["width"])
        first = first_latent(model, open_graph, image, noise.posterior)
    text, *negative = encode_texts(
        model, tokenizers, open_graph, [prompt, *([model["negative_prompt"]] if guided else [])]
    )
    latents = rollout(model, arrays, open_graph, text, negative[0] if negative else None, noise, first)
    frames = decode(model, open_graph, latents)
    return enlarge(open_graph, frames) if "quicksrnet" in model["graphs"] else frames


# --- text and conditioning --------------------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


def sinusoid(values: Sequence[float], channels: int) -> np.ndarray:
    """[N] -> float32 [N, channels]: cosines, then sines, of frequencies 10000^(-2 i / channels)."""
    half = channels // 2
    frequency = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    angle = np.asarray(values, np.float32)[:, None] * frequency[None]
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)


def mlp(arrays: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    """MLP of equation 1."""
    for layer in ("hidden", "out"):
        x = silu(x) if layer == "out" else x
        x = x @ arrays[f"{name}/{layer}/kernel"] + arrays[f"{name}/{layer}/bias"]
    return x


def token_inputs(model: Mapping[str, Any], name: str, tokenize: Callable[[str], Any], prompt: str) -> Arrays:
    """Inputs of a text graph. `end_weights` is 1 at the first end token, or at the largest id where none is named."""
    tokens, end = tokenize(prompt), model["tokenizers"][name]["end_token"]
    ids = tokens["ids"][None]
    place = np.argmax(ids if end is None else ids == end, axis=-1)
    made = {
        "input_ids": ids,
        "attention_mask": tokens["mask"][None],
        "end_weights": (np.arange(ids.shape[1])[None] == place[:, None]).astype(np.float32),
    }
    return {spec["name"]: made[spec["name"]] for spec in model["graphs"][name]["inputs"]}


def encode_texts(
    model: Mapping[str, Any], tokenizers: Tokenizers, open_graph: OpenGraph, prompts: Sequence[str]
) -> list[Text]:
    """What the transformer is told of every prompt."""
    found = {}
    for name in (model["text_graph"], "clip_l", "clip_g"):
        call = open_graph(name)
        found[name] = [call(token_inputs(model, name, tokenizers[name], prompt)) for prompt in prompts]
    return [
        Text(
            found[model["text_graph"]][row]["context"],
            tokenizers[model["text_graph"]](prompt)["mask"][None],
            np.concatenate([found[name][row]["pooled"] for name in ("clip_l", "clip_g")], axis=-1),
        )
        for row, prompt in enumerate(prompts)
    ]


# --- first frame ------------------------------------------------------------------------------------------------------


class PictureText(NamedTuple):
    """What the UNet is told: `context` [1, L, E] and `pooled` [1, P]."""

    context: np.ndarray
    pooled: np.ndarray


def draw_picture(
    model: Mapping[str, Any],
    arrays: Arrays,
    tokenizers: Tokenizers,
    open_graph: OpenGraph,
    prompt: str,
    noise: np.ndarray,
) -> np.ndarray:
    """Equation 6 and the image decoder: uint8 [H, W, 3]."""
    (text,) = encode_picture_texts(model, tokenizers, open_graph, [prompt])
    return decode_picture(model, open_graph, denoise_picture(model, arrays, open_graph, text, noise))


def encode_picture_texts(
    model: Mapping[str, Any], tokenizers: Tokenizers, open_graph: OpenGraph, prompts: Sequence[str]
) -> list[PictureText]:
    """What the UNet is told of every prompt."""
    found = {}
    for name in ("first_frame_clip_l", "first_frame_clip_g"):
        call = open_graph(name)
        found[name] = [call(token_inputs(model, name, tokenizers[name], prompt)) for prompt in prompts]
    return [
        PictureText(np.concatenate([left["penultimate"], right["penultimate"]], axis=-1), right["pooled"])
        for left, right in zip(*found.values(), strict=True)
    ]


def denoise_picture(
    model: Mapping[str, Any], arrays: Arrays, open_graph: OpenGraph, text: PictureText, noise: np.ndarray
) -> np.ndarray:
    """Equation 6: latents [1, h, w, C], times the scaling factor."""
    first = model["first_frame"]
    numbers = sinusoid(first["time_ids"], first["time_id_channels"]).reshape(1, -1)
    sizes = mlp(arrays, "unet/size_embedding", np.concatenate([text.pooled, numbers], axis=-1))
    unet, x = open_graph("unet"), noise[:1]
    for step, z in zip(first["steps"], noise[1:], strict=True):
        time = sinusoid([step["timestep"]], first["time_channels"]) + arrays["unet/guidance"]
        conditioning = silu(mlp(arrays, "unet/time_embedding", time) + sizes)
        e = unet({"latents": x, "conditioning": conditioning, "context": text.context})["prediction"]
        clean = (x - step["noise"] * e) / step["signal"]
        denoised = step["c_skip"] * x + step["c_out"] * clean
        x = step["next_signal"] * denoised + step["next_noise"] * z
    return x


def decode_picture(model: Mapping[str, Any], open_graph: OpenGraph, latents: np.ndarray) -> np.ndarray:
    """Latents of `denoise_picture` -> uint8 [H, W, 3]."""
    image = open_graph("image_decoder")({"latents": latents / model["first_frame"]["scaling_factor"]})["image"]
    return to_picture(to_unit(image[0]))


def first_latent(model: Mapping[str, Any], open_graph: OpenGraph, image: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Equation 7 of a frame, float32 [H, W, 3] in [-1, 1]: [h, w, C]."""
    posterior = open_graph("vae_encoder")({"image": image[None]})
    z = posterior["mean"][0] + np.exp(0.5 * posterior["logvar"][0]) * noise
    return (z - model["latents"]["shift"][0]) * model["latents"]["scale"][0]


# --- rollout ----------------------------------------------------------------------------------------------------------


def halve(x: np.ndarray) -> np.ndarray:
    """Down: [T, h, w, C] -> [T, h / 2, w / 2, C]; h and w are even."""
    x = 0.5 * (x[:, ::2] + x[:, 1::2])
    return 0.5 * (x[:, :, ::2] + x[:, :, 1::2])


def upsample(x: np.ndarray) -> np.ndarray:
    """U: [T, h, w, C] -> [T, 2 h, 2 w, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def patchify(clip: np.ndarray, patch: int) -> np.ndarray:
    """[T, h, w, C] -> [T h w / p^2, p p C], a patch as (row, column, channel)."""
    t, h, w, c = clip.shape
    patches = clip.reshape(t, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, patch * patch * c)


def unpatchify(tokens: np.ndarray, shape: tuple[int, ...], patch: int) -> np.ndarray:
    """The inverse of `patchify` for a clip of `shape`."""
    t, h, w, c = shape
    patches = tokens.reshape(t, h // patch, w // patch, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(shape)


def pyramid(latents: np.ndarray, stages: int) -> list[np.ndarray]:
    """The latents at every stage, coarsest first."""
    levels = [latents]
    for _ in range(stages - 1):
        levels.insert(0, halve(levels[0]))
    return levels


def clean_history(model: Mapping[str, Any], arrays: Arrays, latents: np.ndarray, unit: int) -> list[np.ndarray]:
    """Equation 3 at every stage: [1, N - M, p p C], padding in front."""
    tokens = [patchify(level, model["video"]["patch_size"]) for level in pyramid(latents, model["video"]["stages"])]
    banks = [np.concatenate([np.zeros_like(tokens[0][:1]), *tokens[: stage + 1]]) for stage in range(len(tokens))]
    return [bank[arrays[f"stage_{stage}/index"][unit]][None] for stage, bank in enumerate(banks)]


def geometry(
    model: Mapping[str, Any], arrays: Arrays, stage: int, unit: int, text_mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Equation 4 and the tables of a unit: inputs of the stage's graph that do not depend on latents."""
    place, time = arrays[f"stage_{stage}/position_index"][unit], arrays[f"stage_{stage}/time_ids"][unit]
    image_time = time[text_mask.shape[1] :]
    groups = np.concatenate([(text_mask[0] > 0).astype(np.int32), arrays[f"stage_{stage}/image_groups"][unit]])
    seen = (time[:, None] >= time[None]) & (groups[:, None] == groups[None])
    return {
        "positions": arrays[f"stage_{stage}/positions"][place][None],
        "rotary_cos": arrays["rotary_cos"][image_time][None],
        "rotary_sin": arrays["rotary_sin"][image_time][None],
        "mask": np.where(seen, np.float32(0), np.float32(model["masked_logit"]))[None, None],
    }


def conditionings(
    model: Mapping[str, Any], arrays: Arrays, settings: Mapping[str, Any], branches: Sequence[Text]
) -> list[list[list[np.ndarray]]]:
    """Equation 1 for every stage, step and branch of a unit, [1, D]; the same for all units with these settings."""
    pooled = [mlp(arrays, "pooled_embedder", branch.pooled) for branch in branches]

    def step(timestep: float) -> list[np.ndarray]:
        time = mlp(arrays, "timestep_embedder", sinusoid([timestep], model["time_channels"]))
        return [silu(time + each) for each in pooled]

    return [[step(timestep) for timestep in stage["timesteps"]] for stage in settings["stages"]]


def rollout(
    model: Mapping[str, Any],
    arrays: Arrays,
    open_graph: OpenGraph,
    text: Text,
    negative: Text | None,
    noise: Noise,
    first: np.ndarray | None,
) -> np.ndarray:
    """Equations 1 to 5: normalised latents [T, h, w, C]; `first` [h, w, C] in mode "hybrid"."""
    sampler, stages, patch = model["sampler"], model["video"]["stages"], model["video"]["patch_size"]
    calls = [open_graph(f"mmdit_stage{stage}") for stage in range(stages)]
    latents = np.zeros_like(noise.initial)
    if first is not None:
        latents[0] = first
    for unit in range(sampler["first_unit"], sampler["units"]):
        settings = sampler["later"] if unit else sampler["first"]
        branches = [text] if settings["guidance"] is None else [negative, text]
        if unit in (sampler["first_unit"], 1):  # Those behind have the same steps.
            conditioned = conditionings(model, arrays, settings, branches)
        histories = clean_history(model, arrays, latents, unit)
        x = noise.initial[unit : unit + 1]
        for _ in range(stages - 1):
            x = 2 * halve(x)
        for stage in range(stages):
            if stage:
                jump = sampler["jumps"][stage]
                x = jump["alpha"] * upsample(x) + jump["beta"] * noise.jumps[stage - 1][unit : unit + 1]
            fixed = [
                {"context": branch.context, **geometry(model, arrays, stage, unit, branch.mask)} for branch in branches
            ]
            sigmas = np.asarray(settings["stages"][stage]["sigmas"], np.float32)
            for conditioning, change in zip(conditioned[stage], np.diff(sigmas), strict=True):
                tokens = np.concatenate([histories[stage], patchify(x, patch)[None]], axis=1)
                v = [
                    calls[stage]({"tokens": tokens, "conditioning": given, **inputs})["velocity"]
                    for given, inputs in zip(conditioning, fixed, strict=True)
                ]
                v = [unpatchify(tokens, x.shape, patch) for tokens in v]
                v = v[0] if len(v) == 1 else v[0] + settings["guidance"] * (v[1] - v[0])
                x = x + change * v
        latents[unit] = x[0]
    return latents


# --- frames -----------------------------------------------------------------------------------------------------------


def decode(model: Mapping[str, Any], open_graph: OpenGraph, latents: np.ndarray) -> Iterator[np.ndarray]:
    """Equation 8: uint8 frames [H, W, 3] of latents [T, h, w, C]."""
    call, graph = open_graph("decoder_stream"), model["graphs"]["decoder_stream"]
    carried = graph["carried"]
    states = {
        spec["name"]: np.zeros(spec["shape"], np.float32)
        for spec in graph["inputs"]
        if spec["name"] in carried.values()
    }
    names = [spec["name"] for spec in graph["outputs"] if spec["name"] not in carried]
    for frame, z in enumerate(latents):
        shift, scale = (model["latents"][name][min(frame, 1)] for name in ("shift", "scale"))
        out = call({"latent": (z / scale + shift)[None], **states})
        states = {to: out[name] for name, to in carried.items()}
        for name in names if frame else names[model["dropped_frames"] :]:
            yield to_uint8(out[name][0])


def enlarge(open_graph: OpenGraph, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8 frames, larger."""
    call = open_graph("quicksrnet")
    for frame in frames:
        large = call({"frame": (frame.astype(np.float32) / 255)[None]})["large_frame"][0]
        yield np.round(255 * large).astype(np.uint8)
