"""The served model: tower, reducer and projector are vzip's own, the language model is vLLM's.

It is vLLM's Transformers modelling backend, which builds any model of transformers. Two things
differ. vLLM replaces modules by its own in the language model alone, because the reducer reads
queries and keys from transformers' vision tower. And the media's embeddings come from the family.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import MultiModalDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vzip.integrations.vllm.processing import ReducedInfo, ReducedProcessor, budget_field
from vzip.integrations.vllm.served import ServedReducers, check_stages, check_version
from vzip.media import EXTRA_NAMES, PIXEL_NAMES, MediaInputs

check_version()

MAX_PICTURES = 32
"""Pictures in one run of the tower. vLLM gives as many as their tokens fit, and these are few now."""


def _groups(kind: str, fields: dict[str, Any]) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
    """Yield the media that can be encoded together: budget, their indices, and their inputs.

    They share a budget and the shape of their pixels, and there are at most `MAX_PICTURES`.
    """
    (pixel_name,) = [name for name in PIXEL_NAMES[kind] if name in fields]
    names = [pixel_name, *(name for name in EXTRA_NAMES[kind] if name in fields)]
    budgets = [int(budget) for budget in fields[budget_field(kind)]]

    members: dict[tuple[Any, ...], list[int]] = {}
    for index, budget in enumerate(budgets):
        shape = tuple(fields[pixel_name][index].shape)
        members.setdefault((budget, shape), []).append(index)

    for (budget, _), alike in members.items():
        for start in range(0, len(alike), MAX_PICTURES):
            indices = alike[start : start + MAX_PICTURES]
            inputs = {}
            for name in names:
                inputs[name] = torch.stack([fields[name][index] for index in indices])
            yield budget, indices, inputs


@MULTIMODAL_REGISTRY.register_processor(
    ReducedProcessor, info=ReducedInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class VZipForConditionalGeneration(TransformersMultiModalForCausalLM):
    """A LLaVA-type model behind a reducer, in vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_stages(vllm_config.parallel_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = ServedReducers(self.config)

        # `family` finds the modules in the model. `self.model` is transformers' inner module.
        self.family = self.served.family_class(self, anyres=self.served.family.anyres)

        # The weights are loaded later. An export holds the projector in float32, as it was trained.
        self.family.projector.float()

    def recursive_replace(self) -> None:
        """Let vLLM replace modules in the language model alone.

        It would fuse the projections of the vision tower, whose outputs the reducer reads, and a
        tower that is split over several GPUs would not see all heads.
        """
        others = {name: child for name, child in self.model.named_children() if name != "language_model"}
        for name in others:
            delattr(self.model, name)
        super().recursive_replace()
        for name, child in others.items():
            self.model.add_module(name, child)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Compute the embeddings float[n, d_llm] of each image, or of each video."""
        embeddings: dict[int, Tensor] = {}
        for kind in self.family.kinds:
            if budget_field(kind) not in kwargs:
                continue
            for budget, indices, arguments in _groups(kind, kwargs):
                inputs = MediaInputs.from_processed(kind, arguments)
                features = self.family.visual_features(kind, inputs, self.served.reducers[budget])
                tokens = self.family.project(features).to(self.model.language_model.dtype)
                of_each = torch.split(tokens, features.counts.tolist())
                embeddings |= dict(zip(indices, of_each, strict=True))
        return [embeddings[index] for index in range(len(embeddings))]
