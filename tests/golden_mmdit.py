"""Golden cases of the video transformer and its token layout. Their latents are (B, C, T, H, W); ours are channel-last.

Calls, columns, stages and clips are found by the names of a case's inputs, so a case may hold any number of them.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.models.mmdit import BlockStates, MMDiTConfig, PatchEmbed, PyramidMMDiT, timestep_sinusoid
from nd_jax.models.positions import axis_table, position_table, position_window, rotary_table
from nd_jax.pyramid import history, noise
from nd_jax.pyramid.layout import TokenLayout, token_layout
from nd_jax.weights.folder import load_params
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT, patch_embed_rows
from nd_jax.weights.safetensors_io import SafetensorsFile
from tests.golden_kinds import Arrays, Kind, Outputs, WeightsOf, tensors

# Cases of positions hold only the weights of the patch embedding.
PATCH_EMBED = dataclasses.replace(
    PYRAMID_MMDIT,
    name="patch_embed",
    module=PatchEmbed,
    inputs=lambda config: (jax.ShapeDtypeStruct((1, 1, config.token_dim), jnp.float32),),
    table=lambda config: patch_embed_rows(""),
)


class Call(NamedTuple):
    """What one call of the transformer gives, in the shapes of the cases."""

    flow: jax.Array
    states: BlockStates
    temb: jax.Array
    patch_tokens: jax.Array
    context: jax.Array


def channels_last(clip: np.ndarray) -> np.ndarray:
    return np.moveaxis(clip, 1, -1)


def _numbered(inputs: Arrays, prefix: str) -> list[np.ndarray]:
    """The arrays `prefix0`, `prefix1`, ... in the order of their numbers."""
    numbers = sorted(int(m[1]) for name in inputs if (m := re.fullmatch(re.escape(prefix) + r"(\d+)", name)))
    return [inputs[f"{prefix}{k}"] for k in numbers]


def _layout(config: MMDiTConfig, clips: Sequence[np.ndarray], text_length: int) -> TokenLayout:
    return token_layout(config, [clip.shape[1:4] for clip in clips], text_length)


def _call(config: MMDiTConfig, params: dict, clips: Sequence[np.ndarray], text: Arrays, timestep: np.ndarray) -> Call:
    """`clips` [B, C, T, H, W], history first; `text` has the three arrays of a prompt under their usual names."""
    clips = [channels_last(clip) for clip in clips]
    mask = text["encoder_attention_mask"]
    layout = _layout(config, clips, mask.shape[1])
    model = PyramidMMDiT(config)

    def run(params: dict, context, pooled, timestep, geometry, clips) -> Call:
        variables, tokens = {"params": params}, layout.pack(clips)
        out = model.apply(variables, tokens, context, pooled, timestep, geometry, layout.output_tokens, True)
        return Call(
            jnp.moveaxis(layout.unpack(out.velocity), -1, 1),
            out.states,
            model.apply(variables, timestep, pooled, method="conditioning"),
            model.apply(variables, tokens, geometry.positions, method="embed_tokens"),
            model.apply(variables, context, method="embed_context"),
        )

    pooled, context = text["pooled_projections"], text["encoder_hidden_states"]
    return jax.jit(run)(params, context, pooled, timestep, layout.geometry(mask), clips)


def _block_states(states: BlockStates) -> Outputs:
    """The streams behind every block; the last one has no text."""
    image = {f"block{k}.image": state for k, state in enumerate(states.image[1:])}
    return image | {f"block{k}.text": state for k, state in enumerate(states.text[1:])}


TEXT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


def _text(inputs: Arrays, prefix: str = "", rows: slice = slice(None)) -> Arrays:
    return {name: inputs[prefix + name][rows] for name in TEXT}


def _single_clips(config: MMDiTConfig, params: dict, inputs: Arrays) -> Outputs:
    """`NAME.sample`: one clip without history."""
    out = {}
    for name in (name.removesuffix("sample") for name in inputs if name.endswith("sample")):
        call = _call(config, params, [inputs[f"{name}sample"]], _text(inputs, name), inputs[f"{name}timestep"])
        out |= {f"{name}{key}": getattr(call, key) for key in ("flow", "temb", "patch_tokens")}
    return out


def _packed(config: MMDiTConfig, params: dict, inputs: Arrays) -> Outputs:
    """`columnK.clip0 ...`: columns do not see each other, and their text rows are interleaved."""
    columns, out = {int(name[6 : name.index(".")]) for name in inputs if name.startswith("column")}, {}
    for column in columns:
        rows = slice(column, None, len(columns))
        clips = _numbered(inputs, f"column{column}.clip")
        call = _call(config, params, clips, _text(inputs, rows=rows), inputs["timestep"][rows])
        out[f"column{column}.flow"] = call.flow
    return out


def _with_history(config: MMDiTConfig, params: dict, inputs: Arrays) -> Outputs:
    """`stageS.timestep` and `PREFIX.stageS.timestep`: the clips of a stage, with the text of the prefix."""
    names = sorted(name.removesuffix(".timestep") for name in inputs if name.endswith(".timestep"))
    finest = max(int(name.removeprefix("stage")) for name in names if "." not in name)
    out = _history_clips(_numbered(inputs, "generated."), finest + 1)
    for name in names:
        prefix, _, stage = name.rpartition(".")
        text = _text(inputs, prefix and f"{prefix}.")
        clips = [*_numbered(inputs, f"{stage}.clip"), inputs[f"{stage}.current"]]
        batch = len(inputs[f"{name}.timestep"])
        call = _call(
            config, params, [np.repeat(c, batch // len(c), axis=0) for c in clips], text, inputs[f"{name}.timestep"]
        )
        out[f"{name}.flow"] = call.flow
        if name == f"stage{finest}":
            out |= _block_states(call.states)
    return out


def _history_clips(generated: list[np.ndarray], stages: int) -> Outputs:
    out, pyramid = {}, noise.latent_pyramid(channels_last(np.concatenate(generated, axis=2)), stages)
    for stage in range(stages):
        plan = history.history_plan(len(generated), stage)
        for k, clip in enumerate(history.history_clips(pyramid, plan)):
            out[f"stage{stage}.clip{k}"] = jnp.moveaxis(clip, -1, 1)
    return out


def _teacher(config: MMDiTConfig, params: dict, inputs: Arrays) -> Outputs:
    call = _call(config, params, _numbered(inputs, "clip"), _text(inputs), inputs["timestep"])
    return {"context": call.context, "flow": call.flow, **_block_states(call.states)}


def _rotations(cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """[B, L, K / 2] -> [B, L, 1, K / 2, 2, 2], rows [cos, -sin] and [sin, cos]."""
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)[:, :, None]


def _positions(config: MMDiTConfig, data: dict, params: dict, inputs: Arrays) -> Outputs:
    out = {
        "table": position_table(config),
        "rope.ids": _rotations(*rotary_table(inputs["ids"], config.attention_head_dim)),
        "timestep_sinusoid": jax.jit(timestep_sinusoid)(inputs["timestep"]),
    }
    for h, w, of_h, of_w in data["crops_h_w_H_W"]:
        out[f"crop.{h}x{w}.of.{of_h}x{of_w}"] = position_window(config, (h, w), (of_h, of_w))[None]

    clips, mask = [channels_last(clip) for clip in _numbered(inputs, "clip")], inputs["encoder_attention_mask"]
    layout = _layout(config, clips, mask.shape[1])
    patches = jax.jit(PatchEmbed(config).apply)({"params": params}, layout.pack(clips))
    out["tokens"] = patches + layout.positions[None]
    out["attention_mask"] = layout.geometry(mask).mask.dense()
    batch_ids = np.broadcast_to(layout.time_ids, (len(mask), layout.length))
    out["rope.sequence"] = _rotations(*rotary_table(batch_ids, config.attention_head_dim))

    if "full_table_index" in inputs:
        out["full_table_rows"] = _full_table_rows(data["full_table"], inputs["full_table_index"])
    return out


def _full_table_rows(sizes: dict, index: np.ndarray) -> np.ndarray:
    """Rows of a table that is too large to be made for them."""
    full = {key: sizes[key] for key in ("pos_embed_max_size", "sample_size", "patch_size")}
    table = axis_table(MMDiTConfig(**full, attention_head_dim=sizes["embed_dim"], num_attention_heads=1))
    rows, columns = np.divmod(index, len(table))
    return np.concatenate([table[columns], table[rows]], axis=1)


@dataclasses.dataclass(frozen=True)
class PyramidMMDiTKind:
    """Cases of the public class itself: its positions alone, single clips, or packed columns."""

    official: str = "neodragon.pyramid_mmdit.PyramidMMDiT"

    def run(self, case: dict, file: SafetensorsFile) -> Outputs:
        weights, inputs = WeightsOf(file), tensors(file, "in.")
        config = PYRAMID_MMDIT.read_config(case["config"])
        alone = all(key.startswith("pos_embed.") for key in weights.keys())
        params = load_params(PATCH_EMBED if alone else PYRAMID_MMDIT, config, weights, str(file.path))
        if alone:
            return _positions(config, case["data"], params, inputs)
        packed = any(name.startswith("column") for name in inputs)
        return (_packed if packed else _single_clips)(config, params, inputs)

    def numbers(self, case: dict) -> dict[str, Any]:
        return {}


KINDS = (
    PyramidMMDiTKind(),
    Kind(
        "neodragon.pyramid_mmdit.PyramidMMDiT + utils.generation_utils._prepare_past_condition_latents",
        PYRAMID_MMDIT,
        _with_history,
    ),
    Kind("pyramid_dit.mmdit_modules.PyramidDiffusionMMDiT", PYRAMID_FLOW_MMDIT, _teacher),
)
