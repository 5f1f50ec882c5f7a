"""What a served model's `config.json` says: its family, its reducers, and their budgets."""

from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import vllm
from packaging.specifiers import SpecifierSet

from vzip.errors import UserError
from vzip.families import Family, families
from vzip.reducers import Reducer, create
from vzip.runs.meta import EXPORT, FORMAT, anyres_of, reducers_of
from vzip.runs.projector import budget_of

SUPPORTED = SpecifierSet(">=0.32,<0.33")
"""Versions of vLLM that the plugin was tested with. It uses parts that vLLM does not promise to keep."""

FAMILIES = ("llava", "llava_next", "llava_onevision", "mini_gemini")
"""Families that the plugin was tested with. Others may count or place their tokens in another way."""


def check_version() -> None:
    """Raise UserError for a version of vLLM that the plugin was not tested with."""
    version = vllm.__version__
    if not SUPPORTED.contains(version, prereleases=True):
        raise UserError(
            f"vzip serves with vLLM {SUPPORTED}, this is {version}; install one of those versions"
        )


def check_stages(parallel_config: Any) -> None:
    """Raise UserError if the model is split into stages of a pipeline."""
    # Such a server would start, and end at the first request.
    if parallel_config.pipeline_parallel_size > 1:
        raise UserError(
            f"--pipeline-parallel-size={parallel_config.pipeline_parallel_size}: vzip does not serve a "
            f"model in stages; split its layers with --tensor-parallel-size instead"
        )


class ServedReducers:
    """The reducers of a served model, by budget.

    Args:
        config: the model's config.

    Attributes:
        reducers: the reducers by budget, the default first.
        aspect_ratio: how the run's processor treats pictures that are not square
            (`vzip.media.ASPECT_RATIOS`). None if any processor will do.

    Raises:
        UserError: the config describes no reducer, or one that does not fit the model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        meta = getattr(config, EXPORT, None)
        if not isinstance(meta, Mapping) or not isinstance(meta.get("reducer"), Mapping):
            raise UserError(
                f"config.json has no description {EXPORT!r} of a reducer; serve a folder that "
                f"`make export TO=hf` wrote"
            )
        if meta.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"config.json: {EXPORT}.format={meta['format']!r} is unknown; this version of vzip reads "
                f"format {FORMAT}, so install the version that wrote the export"
            )

        self.aspect_ratio: str | None = meta.get("image_aspect_ratio")
        self.family: Family = self.family_class(SimpleNamespace(config=config), anyres=anyres_of(meta))
        self.reducers: dict[int, Reducer] = reducers_of(self._with_budget(meta))

        # A reducer that does not fit the model is refused at the start, not at the first picture.
        for reducer in self.reducers.values():
            self.family.check_reducer(reducer)

    @property
    def family_class(self) -> type[Family]:
        """The adapter of the model's family. Raises UserError for one that is not served."""
        model_type = self.config.model_type
        if model_type not in FAMILIES:
            raise UserError(
                f"model_type={model_type!r} is not served with vLLM; serve one of: {', '.join(FAMILIES)}"
            )
        return families()[model_type]

    def _with_budget(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Add the budget to a description that a user gave, and that names a reducer alone."""
        if "budget" in meta:
            return {"other_budgets": {}, **meta}

        # A budget counts the tokens of several tiles here as it does everywhere.
        settings = {name: value for name, value in meta["reducer"].items() if name not in ("name", "anyres")}
        if "budget" in settings:
            settings["tiles"] = self.family.budget_tiles
        reducer = create(str(meta["reducer"].get("name")), settings)
        description = self.family.describe_reduction(reducer)
        return {"budget": budget_of(self.family, reducer), "reducer": description, "other_budgets": {}}

    @cached_property
    def default(self) -> int:
        """The budget of a request that names none."""
        return next(iter(self.reducers))

    @cached_property
    def largest(self) -> int:
        """The budget with the most tokens, which memory is planned for."""
        return max(self.reducers)

    @cached_property
    def takes_several_images(self) -> bool:
        """Whether an image has the same tokens beside others as alone.

        vLLM prepares each image of a prompt by itself, whatever stands beside it.
        """
        reducer = self.reducers[self.default]
        sizes = self.family.image_sizes[-1:]
        alone = self.family.num_example_tokens(reducer, sizes)
        return self.family.num_example_tokens(reducer, 2 * sizes) == 2 * alone

    def reducer(self, budget: Any) -> Reducer:
        """Return the reducer of a budget, the default for None. Raises UserError for another one."""
        if budget is None:
            budget = self.default
        if type(budget) is not int or budget not in self.reducers:
            budgets = ", ".join(str(each) for each in self.reducers)
            raise UserError(
                f"mm_processor_kwargs: budget={budget!r} was not tuned; this model serves: {budgets}"
            )
        return self.reducers[budget]
