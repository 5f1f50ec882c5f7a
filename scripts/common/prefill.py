"""Measure the prefill of a model behind a reducer: its time, FLOPs and KV cache."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vzip
from scripts.common.timing import alternating
from vzip.cost import attention_flops, example_cost, linear_flops
from vzip.families import Family
from vzip.media import MediaInputs
from vzip.reducers import Reducer

# "token" counts from a finished prefill, so it does not include one.
PARTS = {
    "language": "prefill, language model alone",
    "whole": "prefill, from the pixels",
    "token": "generated tokens",
}
"""The parts of an answer that are timed, with their titles."""


@dataclass(frozen=True)
class TimingPlan:
    """How often the parts are timed, and on which device."""

    new_tokens: int
    """Generated tokens that are timed after a prefill."""
    rounds: int
    """How often each part is timed."""
    device: torch.device


class Prefill:
    """A batch of questions of the same length, for a model with a reducer.

    Args:
        family: adapter of the model.
        reducer: the reducer. It is attached while the model runs.
        inputs: arguments of the model, with one placeholder for each token that the reducer keeps.
    """

    def __init__(self, family: Family, reducer: Reducer, inputs: Mapping[str, Tensor]) -> None:
        self.family = family
        self.reducer = reducer
        self.inputs = inputs
        self.embeddings = self._capture_embeddings()

    def _capture_embeddings(self) -> Tensor:
        """float[B, N, d_llm]: run the model once, and keep the input of its language model."""
        # The language model can then be timed alone, on its real input.
        captured: dict[str, Any] = {}

        def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            captured.update(kwargs)

        hook = self.family.language_model.register_forward_pre_hook(capture, with_kwargs=True)
        self.whole()
        hook.remove()
        embeddings: Tensor = captured["inputs_embeds"]
        return embeddings

    @torch.no_grad()
    def whole(self) -> Any:
        """Run the vision tower, reducer, projector and language model.

        Returns the output with its cache.
        """
        # As in generation, the head computes the logits of the last token alone.
        with vzip.attach(self.family.model, reducer=self.reducer):
            return self.family.model(**self.inputs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def language(self) -> Any:
        """Run the language model alone, on the embeddings of all tokens.

        Returns the same output.
        """
        return self.family.model(inputs_embeds=self.embeddings, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, prefilled: Any, *, num_tokens: int) -> Tensor:
        """Generate more tokens greedily.

        Args:
            prefilled: an output of `whole` or `language`. Its cache is restored afterwards.
            num_tokens: number of tokens behind the first one, which comes from the prefill.

        Returns:
            int64[B, num_tokens]
        """
        cache = prefilled.past_key_values
        ids = [prefilled.logits[:, -1:].argmax(dim=-1)]
        for _ in range(num_tokens):
            output = self.family.model(input_ids=ids[-1], past_key_values=cache, use_cache=True)
            ids.append(output.logits[:, -1:].argmax(dim=-1))

        # Restore the cache, so that the next round starts from the same prefill.
        cache.crop(-num_tokens)
        return torch.cat(ids[1:], dim=1)

    def size(self, prefilled: Any) -> dict[str, int]:
        """Count the tokens, bytes and FLOPs of a prefill.

        Returns:
            "num_visual_tokens", "num_text_tokens": tokens of one question.
            "kv_bytes": bytes of the keys and values of the batch.
            "language_flops", "whole_flops": FLOPs of one question's prefill by the cost formula.
        """
        family = self.family
        input_ids = self.inputs["input_ids"]
        batch_size, num_tokens = input_ids.shape
        num_visual = int((input_ids[0] == family.placeholder_id("image")).sum())
        num_text = num_tokens - num_visual

        # Add up the cache's own tensors, because its layers may differ in size.
        kv_bytes = 0
        for layer in prefilled.past_key_values.layers:
            kv_bytes += layer.keys.nbytes + layer.values.nbytes

        # The head computes the logits of the last token alone. Causal attention computes half of
        # the attention matrix.
        language_flops = num_tokens * linear_flops(family.language_model)
        language_flops += linear_flops(family.lm_head)
        language_flops += attention_flops(family.language_model.config, num_tokens) // 2

        # The cost of an example includes the projector's backward pass, which inference does not
        # have. So only half of the projector's cost counts below.
        pixels = MediaInputs.from_processed("image", self.inputs).pixels
        cost = example_cost(
            family,
            self.reducer,
            num_tiles=pixels.shape[:-3].numel() // batch_size,
            num_visual_tokens=num_visual,
            num_text_tokens=num_text,
        )
        return {
            "num_visual_tokens": num_visual,
            "num_text_tokens": num_text,
            "kv_bytes": kv_bytes,
            "language_flops": language_flops,
            "whole_flops": language_flops + cost.tower + cost.projector // 2,
        }


def measure_prefill(cases: Mapping[str, Prefill], plan: TimingPlan) -> dict[str, dict[str, Any]]:
    """Measure the size of each case, and the seconds of each of `PARTS` in each round.

    The cases take turns.
    """
    # Decoding needs a finished prefill, which is not timed with it.
    prefilled = {name: case.language() for name, case in cases.items()}

    def decode(name: str) -> Tensor:
        return cases[name].decode(prefilled[name], num_tokens=plan.new_tokens)

    # The default argument binds the name now: otherwise all cases would decode the last one.
    calls = {
        "language": {name: case.language for name, case in cases.items()},
        "whole": {name: case.whole for name, case in cases.items()},
        "token": {name: lambda name=name: decode(name) for name in cases},
    }

    figures: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        figures[name] = dict(case.size(prefilled[name]))

    for part, title in PARTS.items():
        seconds = alternating(calls[part], rounds=plan.rounds, device=plan.device, title=title)
        for name in cases:
            # A call of "token" generates several tokens, and the figure is the time of one.
            num_repeats = plan.new_tokens if part == "token" else 1
            times = [total / num_repeats for total in seconds[name]]
            figures[name][part] = {"seconds": times, "median_s": statistics.median(times)}

    return figures
