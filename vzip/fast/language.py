"""A language model of transformers over packed examples, up to the final norm.

The layers are the model's own modules, called one by one. While they run, their attention is
`packed_attention`, which is found through transformers' registry, and the forwards of their norms
and MLPs are replaced by those of `vzip.fast.fused`. Afterwards the model is as it was before.

Legend of shapes: T tokens, P prefix tokens, n tokens whose output is needed, d width, K key heads,
c width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vzip.errors import UserError
from vzip.fast.attention import PACKED_ATTENTION, packed_attention
from vzip.fast.fused import rms_norm, swiglu_mlp
from vzip.fast.segments import Prefix, Segments
from vzip.patch import replaced_forwards

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")
"""Language models whose layers consist of a norm, attention, a norm and a SwiGLU MLP."""


def _sliding_window(config: Any) -> int | None:
    """Return the number of tokens that a token attends to; None without a limit."""
    # A config may have a window that none of its layers uses.
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None

    window: int | None = getattr(config, "sliding_window", None)
    return window


def check_language_model(config: Any, *, longest: int) -> None:
    """Check that the fast path can run a language model on examples of up to `longest` tokens.

    Raises:
        UserError: its `config` has a type or a setting that the fast path doesn't support.
    """
    advice = "use engine=reference for it"
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        raise UserError(
            f"engine=fast takes language models of type {', '.join(MODEL_TYPES)} with SwiGLU, "
            f"not {config.model_type!r} with {config.hidden_act!r}; {advice}"
        )

    window = _sliding_window(config)
    if window is not None and window < longest:
        raise UserError(
            f"the language model attends to {window} tokens, but the longest example has {longest}, "
            f"and engine=fast would attend to all of them; {advice}, or shorten examples with "
            "data.max_tokens"
        )

    rope_type = (config.rope_parameters or {}).get("rope_type")
    # "dynamic" positions are the usual ones up to the length that the model was trained with.
    is_dynamic = rope_type == "dynamic" and longest > config.max_position_embeddings
    if is_dynamic or rope_type == "longrope":
        raise UserError(
            "engine=fast does not support positions that depend on an example's length "
            f"(rope_type={rope_type!r}); {advice}"
        )

    if config.attention_dropout:
        raise UserError(
            f"engine=fast does not support dropout (attention_dropout={config.attention_dropout}); {advice}"
        )


class PackedLanguage:
    """Runs a language model over packed examples.

    Args:
        model: the model without its head, e.g. a `LlamaModel`.
        recompute: save only the MLPs' inputs, and run the MLPs again in the backward pass.
        compiled: make one kernel each of the norms' and MLPs' elementwise operations.
    """

    def __init__(self, model: Any, *, recompute: bool = False, compiled: bool = False) -> None:
        self.model = model
        self.recompute = recompute
        self.compiled = compiled

    @torch.no_grad()
    def prefixes(self, ids: Sequence[int], device: torch.device) -> list[Prefix]:
        """Compute the prefix's keys and values float[K, P, c], by layer.

        The prefix is what every example begins with. Its keys and values depend on frozen weights
        alone, so they can be computed once.
        """
        if ids:
            input_ids = torch.tensor([list(ids)], device=device)
            cache = self.model(input_ids=input_ids, use_cache=True).past_key_values
            return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

        # Without a prefix, each layer has keys and values of no tokens.
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = torch.zeros(config.num_key_value_heads, 0, width, dtype=self.model.dtype, device=device)
        return [(empty, empty)] * config.num_hidden_layers

    def _forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """The forwards that replace those of the model's norms and MLPs."""
        norms = [self.model.norm]
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for layer in self.model.layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
            forwards[layer.mlp] = partial(
                swiglu_mlp, layer.mlp, recompute=self.recompute, compiled=self.compiled
            )

        for norm in norms:
            forwards[norm] = partial(rms_norm, norm, compiled=self.compiled)
        return forwards

    @contextmanager
    def _packed(self) -> Iterator[None]:
        """Give the model packed attention and fused norms and MLPs while the block runs."""
        # transformers looks up a layer's attention by the name in the config, at every call.
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)
        config = self.model.config
        own_attention = config._attn_implementation
        config._attn_implementation = PACKED_ATTENTION
        try:
            with replaced_forwards(self._forwards()):
                yield
        finally:
            config._attn_implementation = own_attention

    def __call__(
        self, embeddings: Tensor, segments: Segments, at: Tensor, *, added: Sequence[Tensor] = ()
    ) -> Tensor:
        """Run the model, and return the normed outputs float[n, d] of the tokens `at`.

        Args:
            embeddings: float[T, d].
            segments: where the examples are, with the prefix.
            at: int64[n], positions in the sequence.
            added: float[T, d] each, added to the outputs of the first layers.
        """
        hidden = embeddings[None]
        with self._packed():
            settings = {
                "attention_mask": None,
                "position_embeddings": self.model.rotary_emb(hidden, position_ids=segments.positions),
                "segments": segments,
            }

            *layers, last = self.model.layers
            assert len(added) <= len(layers)
            for number, layer in enumerate(layers):
                hidden = layer(hidden, **settings)
                if number < len(added):
                    hidden = hidden + added[number]

            # The attention of the last layer needs all tokens. What follows it treats each token by
            # itself, so it runs only for the tokens `at`.
            mixed, _ = last.self_attn(hidden_states=last.input_layernorm(hidden), **settings)
            needed = (hidden + mixed)[0].index_select(0, at)
            needed = needed + last.mlp(last.post_attention_layernorm(needed))
            normed: Tensor = self.model.norm(needed)

        return normed
