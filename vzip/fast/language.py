"""A language model of transformers over packed rows, up to the final norm of the tokens whose output is asked for.

The layers are the model's own modules, called one by one. While they run, their attention is `packed_attention`, through
transformers' registry, and their norms and MLPs are those of `vzip.fast.fused`, on the instances; then all is as before.

Legend of shapes: T tokens, P prefix tokens, n tokens asked for, d width, K key heads, c width of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vzip.errors import UserError
from vzip.fast.attention import NAME
from vzip.fast.fused import rms_norm, swiglu_mlp
from vzip.fast.segments import Prefix, Segments
from vzip.patch import replaced_forwards

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Language models whose layers are known to be of a norm, attention, a norm and a SwiGLU MLP, all frozen."""


def check_language_model(config: Any, *, longest: int) -> None:
    """Raises UserError unless the fast path takes a language model of this config, with rows of up to `longest` tokens."""
    advice = "use engine=reference for it"
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        raise UserError(
            f"engine=fast takes language models of type {', '.join(MODEL_TYPES)} with SwiGLU, not {config.model_type!r} with "
            f"{config.hidden_act!r}; {advice}"
        )
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if windows else None
    if window is not None and window < longest:
        raise UserError(
            f"the language model attends to {window} tokens, the longest row has {longest}, which engine=fast would see "
            f"whole; {advice}, or cut rows with data.max_tokens"
        )
    if (rope := (config.rope_parameters or {}).get("rope_type")) in ("dynamic", "longrope"):
        raise UserError(
            f"engine=fast knows no positions that depend on a row's length, as rope_type={rope!r} has; {advice}"
        )
    if config.attention_dropout:
        raise UserError(
            f"engine=fast has no dropout, and attention_dropout={config.attention_dropout}; {advice}"
        )


class PackedLanguage:
    """Runs a language model over packed rows.

    Args:
        model: the model without its head, e.g. a `LlamaModel`.
        recompute: keep only the MLPs' inputs for the backward pass, and run them again there.
        compiled: make one kernel each of the norms' and MLPs' elementwise operations.
    """

    def __init__(self, model: Any, *, recompute: bool = False, compiled: bool = False) -> None:
        self.model, self.recompute, self.compiled = model, recompute, compiled

    @torch.no_grad()
    def prefixes(self, ids: Sequence[int], device: torch.device) -> list[Prefix]:
        """Keys and values float[K, P, c] by layer of the tokens that every row begins with; they depend on frozen weights."""
        if not ids:
            config = self.model.config
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            empty = torch.zeros(config.num_key_value_heads, 0, width, dtype=self.model.dtype, device=device)
            return [(empty, empty)] * config.num_hidden_layers
        cache = self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=True).past_key_values
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    @contextmanager
    def _packed(self) -> Iterator[None]:
        """The model with packed attention and fused parts."""
        layers = self.model.layers
        norms = [
            self.model.norm,
            *(n for each in layers for n in (each.input_layernorm, each.post_attention_layernorm)),
        ]
        compiled = self.compiled
        forwards = {norm: partial(rms_norm, norm, compiled=compiled) for norm in norms}
        forwards |= {
            each.mlp: partial(swiglu_mlp, each.mlp, recompute=self.recompute, compiled=compiled)
            for each in layers
        }
        config, before = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = NAME
        try:
            with replaced_forwards(forwards):
                yield
        finally:
            config._attn_implementation = before

    def __call__(self, embeddings: Tensor, segments: Segments, at: Tensor) -> Tensor:
        """float[n, d]: normed outputs of the tokens `at`; the last layer runs for them alone, but for its attention.

        Args:
            embeddings: float[T, d].
            segments: where the rows are, with the prefix.
            at: int64[n], places in the sequence.
        """
        hidden = embeddings[None]
        with self._packed():
            *layers, last = self.model.layers
            settings = {
                "attention_mask": None,
                "position_embeddings": self.model.rotary_emb(hidden, position_ids=segments.positions),
                "segments": segments,
            }
            for layer in layers:
                hidden = layer(hidden, **settings)
            mixed, _ = last.self_attn(hidden_states=last.input_layernorm(hidden), **settings)
            asked = (hidden + mixed)[0].index_select(0, at)
            asked = asked + last.mlp(last.post_attention_layernorm(asked))
            normed: Tensor = self.model.norm(asked)
        return normed
