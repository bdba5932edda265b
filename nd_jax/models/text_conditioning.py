"""From token ids to what the video transformer is told: a context of text tokens and one pooled vector.

    context = T5(ids)                      Pyramid-Flow; its context embedder is a part of the transformer       (1)
    context = CA(DT5(ids))                 Neodragon, where CA is the ContextAdapter                             (2)
    pooled  = [CLIP-L(ids_1), CLIP-G(ids_2)]                                                                     (3)

The parameter tree has the names of a model folder's subfolders: `text_encoder` (CLIP-L), `text_encoder_2` (CLIP-G),
`text_encoder_3` (T5 or DT5) and, for (2), `context_adapter`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nd_jax.models import clip_text, t5
from nd_jax.models.clip_text import CLIPText, CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapter, ContextAdapterConfig
from nd_jax.models.traced_once import apply_network

# Columns of a batch: T5 ids and mask, and the ids of either CLIP.
TEXT_COLUMNS = ("ids", "mask", "clip_ids", "clip_2_ids")

LOGICAL_AXES = t5.LOGICAL_AXES + clip_text.LOGICAL_AXES


class Conditioning(NamedTuple):
    """What a prompt is to the transformer.

    Attributes:
      context: [B, T, E], text tokens.
      mask: int [B, T], 1 for real tokens.
      pooled: [B, P].
    """

    context: jax.Array
    mask: jax.Array
    pooled: jax.Array


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """Sizes of the text networks under the names of their folders; a `context_adapter` goes with DT5 alone."""

    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    text_encoder_3: t5.T5Config | t5.DistilT5Config
    context_adapter: ContextAdapterConfig | None = None

    def __post_init__(self):
        distilled = isinstance(self.text_encoder_3, t5.DistilT5Config)
        if distilled != (self.context_adapter is not None):
            raise ValueError("a distilled text_encoder_3 (DT5) and a context_adapter go together: give both or neither")
        if distilled and self.text_encoder_3.projection_dim != self.context_adapter.input_dims:
            raise ValueError(
                f"text_encoder_3 puts out {self.text_encoder_3.projection_dim} channels and context_adapter takes "
                f"{self.context_adapter.input_dims}: they must be equal"
            )

    @property
    def context_dim(self) -> int:
        """E of `Conditioning`."""
        return self.context_adapter.output_dims if self.context_adapter else self.text_encoder_3.d_model

    @property
    def pooled_dim(self) -> int:
        """P of `Conditioning`."""
        return self.text_encoder.projection_dim + self.text_encoder_2.projection_dim


def encode_text(
    encoders: TextEncoders, params: Mapping[str, Any], batch: Mapping[str, jax.Array], dtype: Any = jnp.float32
) -> Conditioning:
    """Equations 1 to 3.

    Args:
      encoders: sizes.
      params: parameter trees under the names of the folders.
      batch: `TEXT_COLUMNS`: `ids` and `mask` int32 [B, T] of T5, `clip_ids` and `clip_2_ids` int32 [B, L], padded as
        each tokenizer pads.
      dtype: of the computation and the result.
    """
    pooled = [
        apply_network(CLIPText(config, dtype=dtype), params[name], batch[column]).text_embeds
        for name, config, column in (
            ("text_encoder", encoders.text_encoder, "clip_ids"),
            ("text_encoder_2", encoders.text_encoder_2, "clip_2_ids"),
        )
    ]
    tree = params["text_encoder_3"]
    if encoders.context_adapter is None:
        encoder = t5.T5Encoder(encoders.text_encoder_3, dtype=dtype)
        context = apply_network(encoder, tree, batch["ids"], batch["mask"]).hidden
    else:
        encoder = t5.DistilT5(encoders.text_encoder_3, dtype=dtype)
        hidden = apply_network(encoder, tree, batch["ids"], batch["mask"])
        adapter = ContextAdapter(encoders.context_adapter, dtype=dtype)
        context = apply_network(adapter, params["context_adapter"], hidden)
    return Conditioning(context, batch["mask"], jnp.concatenate(pooled, axis=-1))
