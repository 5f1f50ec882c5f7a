"""How vLLM turns a prompt with pictures into tokens: as many placeholders as the reducer leaves.

A request names its budget in `mm_processor_kwargs`, as in {"budget": 128}. vLLM makes these settings
a part of the names of everything that it caches, so budgets never share an entry. Each picture
carries its budget to the model as one more field.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from vzip.errors import UserError
from vzip.integrations.vllm.served import ServedReducers
from vzip.media import EXTRA_NAMES, KINDS, PIXEL_NAMES, set_aspect_ratio
from vzip.processor import reduced_processor

BUDGET = "budget"
"""The setting in `mm_processor_kwargs`."""


def budget_field(kind: str) -> str:
    """Name the field that carries the budget of each image, or of each video."""
    return f"{kind}_{BUDGET}"


def _without_budget(processor_class: Any) -> Any:
    """Make a subclass of a processor that takes the budget among its settings, and ignores it."""

    class Reduced(processor_class):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop(BUDGET, None)
            return super().__call__(*args, **kwargs)

    Reduced.__name__ = processor_class.__name__
    return Reduced


class ReducedInfo(MultiModalProcessingInfo):
    """Gives vLLM the model's processor, reduced to a budget."""

    @cached_property
    def served(self) -> ServedReducers:
        """The budgets of the model."""
        return ServedReducers(self.get_hf_config())

    @cached_property
    def _processors(self) -> dict[int, Any]:
        """The reduced processors that were asked for, by budget."""
        return {}

    @cached_property
    def _whole_processor(self) -> Any:
        """The model's processor, which counts all tokens.

        The family loads it, because transformers needs torchvision for those of videos.
        """
        processor = self.served.family_class.load_processor(self.ctx.model_config.model)

        # With torchvision, transformers loads an image processor that rounds in another way.
        return set_aspect_ratio(processor, self.served.aspect_ratio)

    def budget_of(self, settings: Mapping[str, object]) -> int:
        """Return the budget of a request. Raises UserError for one that was not tuned."""
        budget = self.ctx.get_merged_mm_kwargs(settings).get(BUDGET)
        self.served.reducer(budget)
        return self.served.default if budget is None else int(budget)

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return the processor for the budget in `kwargs`. Raises UserError for another one."""
        budget = self.budget_of(kwargs)
        if budget not in self._processors:
            reducer = self.served.reducers[budget]
            reduced = reduced_processor(self._whole_processor, self.served.family, reducer)
            reduced.__class__ = _without_budget(type(reduced))
            self._processors[budget] = reduced
        return self._processors[budget]

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        """Return how many images and videos a prompt may have; None is any number."""
        limits: dict[str, int | None] = super().get_supported_mm_limits()

        # LLaVA-OneVision cuts an image into tiles only if it is alone.
        if not self.served.takes_several_images:
            limits["image"] = 1
        return limits

    def _get_num_mm_tokens(self, **sizes: Any) -> Any:
        # vLLM plans its memory by this count, so it must hold for every budget.
        return self.get_hf_processor(budget=self.served.largest)._get_num_multimodal_tokens(**sizes)


class ReducedProcessor(MultiModalProcessor):
    """Adds the budget to the fields of each picture."""

    info: ReducedInfo

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """Process a request. Raises UserError for settings other than the budget."""
        # Others could ask for pictures of any size, and for the memory that these take.
        others = sorted(set(inputs.hf_processor_mm_kwargs) - {BUDGET})
        if others:
            raise UserError(
                f"mm_processor_kwargs: {', '.join(others)} can't be set in a request; "
                f"it may give {BUDGET!r} alone"
            )
        return super().apply(inputs, timing_ctx)

    def _get_modality_field_names(self, modality: str) -> set[str]:
        # vLLM drops fields that belong to no kind of media if a prompt has several kinds.
        names: set[str] = super()._get_modality_field_names(modality)
        return names | {*PIXEL_NAMES[modality], *EXTRA_NAMES[modality]}

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        fields = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        for kind in KINDS:
            if f"{kind}_replacement_sizes" in fields:
                num_media = len(fields[f"{kind}_replacement_sizes"])
                fields[budget_field(kind)] = torch.full((num_media,), self.info.budget_of(hf_kwargs))
        return fields

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        # The base class would ask which kind of media these fields belong to.
        budgets = {}
        for kind in KINDS:
            if budget_field(kind) in hf_inputs:
                budgets[kind] = hf_inputs.pop(budget_field(kind))
        config = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))

        for kind, budget in budgets.items():
            hf_inputs[budget_field(kind)] = budget
            config[budget_field(kind)] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return config
