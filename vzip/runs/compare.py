"""One model in the settings of the results table: all tokens, training-free, and tuned.

The frozen weights are in memory once; the projectors and LoRA are put in and out.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vzip.errors import UserError
from vzip.families import Family, families, family_at
from vzip.handle import Handle
from vzip.media import set_aspect_ratio
from vzip.reducers import Reducer, with_budget
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.runs.adapter import load_adapter
from vzip.runs.meta import anyres_of, has_file, is_export, locate, read_meta, reducers_of, template_of
from vzip.runs.projector import budget_of, check_fits, load_tuned, load_weights, projector_parameters
from vzip.templates.jinja import chat_template

SETTINGS = ("full", "free", "tuned")
"""The settings of the results table.

"full": all tokens, and the projector of the base model. "free" (training-free): reduced, with the
same projector. "tuned": reduced, with the tuned projector.
"""

_GIVE_BASE = "Pass base=... (for a command --base) with its folder or hub id"
_EXPORT_AGAIN = "Export the run again, with --copy where the base model's own files may go"


def check_tuned_budget(budget: int | None, tuned: Collection[int]) -> None:
    """Check that a projector was tuned for a budget; None means the first one.

    Raises:
        UserError: the projector was not tuned for this budget.
    """
    if budget is not None and budget not in tuned:
        budgets = ", ".join(map(str, tuned))
        raise UserError(
            f"this projector was not tuned for budget={budget!r}, but for {budgets}; "
            "give one that it was tuned for"
        )


# Loading the parts of a comparison


def _load_base(
    family_class: type[Family],
    source: str,
    *,
    dtype: torch.dtype,
    anyres: str = "released",
    aspect_ratio: str | None = None,
    advice: str = _GIVE_BASE,
) -> tuple[Family, Any]:
    """Load a base model, frozen, with its projector in float32, and its processor.

    `aspect_ratio` is that of `vzip.media.set_aspect_ratio`. Raises UserError if the model or the
    processor can't be loaded; the message ends with the advice.
    """
    # A base model that has moved is the usual reason, so the message says how to name its new path.
    try:
        model = family_class.load_model(source, dtype=dtype)
        processor = set_aspect_ratio(family_class.load_processor(source), aspect_ratio)
    except (OSError, UserError) as error:
        raise UserError(f"the base model {source} can't be loaded: {error}\n{advice}") from error

    # The projector is tuned and saved in float32, so it must not lose bits here.
    family = family_class(model.eval().requires_grad_(False), anyres=anyres)
    family.projector.float()

    # A reducer's method casts what the projector gets. Without a reducer, the model's own does not.
    for module in family.projector_modules:
        module.register_forward_pre_hook(_cast_inputs)
    family.read_processor(processor)
    return family, processor


def _cast_inputs(projector: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast the inputs of a projector to its own precision, as a forward hook."""
    dtype = next(projector.parameters()).dtype
    return tuple(value.to(dtype) for value in inputs)


def _load_base_of_run(folder: Path, meta: Mapping[str, Any], *, base: str | None) -> tuple[Family, Any]:
    """Load the base model that a run or an export belongs to, with the precision of the run."""
    source = base or meta["base"]["id"]
    advice = _GIVE_BASE

    # An export holds its base model. Another one beside it could only be a mistake.
    if is_export(folder):
        if base is not None:
            raise UserError(f"base={base}: {folder} is an export, which holds its base model; leave base out")
        source = str(folder)
        advice = _EXPORT_AGAIN

    # A later version may know families that this one lacks.
    model_type = meta["base"]["model_type"]
    if model_type not in families():
        raise UserError(
            f"{folder} is a run of the family {model_type!r}, which this version does not know; "
            "use the version that tuned it"
        )
    return _load_base(
        families()[model_type],
        source,
        dtype=getattr(torch, meta["dtype"]),
        anyres=anyres_of(meta),
        # The projector was tuned for pictures of this form. Older runs left the processor as it was.
        aspect_ratio=meta.get("image_aspect_ratio"),
        advice=advice,
    )


def _cast(family: Family, dtype: torch.dtype) -> None:
    """Cast the frozen parameters. Buffers, such as rotary frequencies, keep their precision."""
    trained = projector_parameters(family)
    for name, parameter in family.model.named_parameters():
        if name not in trained:
            parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class _Projectors:
    """The projectors of a run.

    Attributes:
        parameters: the parameters of the model that they are copied into.
        base: the projector that training started from; None if it can't be had.
        tuned: the tuned projector.
    """

    parameters: Mapping[str, Tensor]
    base: Mapping[str, Tensor] | None
    tuned: Mapping[str, Tensor]


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _read_projectors(family: Family, folder: Path, meta: Mapping[str, Any]) -> _Projectors:
    """Read the projectors of a run or an export. The tuned one stays in the model."""
    parameters = projector_parameters(family)

    # Training started from the base's own projector, or from a file, which may be gone by now.
    # An export holds the tuned projector alone.
    start = meta["base"]["projector"]
    base = None
    if not is_export(folder):
        if start is None:
            base = _copies(parameters)
        elif has_file(start):
            load_weights(family, start)
            base = _copies(parameters)

    # Copies, because the parameters themselves change with each setting.
    load_tuned(family, folder, meta)
    return _Projectors(parameters, base, tuned=_copies(parameters))


# The comparison


class Comparison:
    """One base model, and the settings in which it can answer.

    Attributes:
        family: the family of the model. Outside `row` the model has no reducer, and the projector
            of the setting that came last: before the first one the tuned projector of a run or an
            export, or that of a base model. LoRA is active there.
        processor: the base model's, with the chat template that the projector was tuned with. It
            pads pictures if the run did.
        reducers: the reducers of a run by budget, the first one first; empty for a base model.
        meta: meta.json of a run, or the same entries of an export; empty for a base model.
        adapter: peft's model around the model; None without LoRA.
    """

    def __init__(
        self,
        family: Family,
        processor: Any,
        *,
        reducers: Mapping[int, Reducer] | None = None,
        meta: Mapping[str, Any] | None = None,
        projectors: _Projectors | None = None,
        adapter: Any = None,
    ) -> None:
        self.family = family
        self.processor = processor
        self.reducers = dict(reducers or {})
        self.meta = dict(meta or {})
        self.adapter = adapter
        self._projectors = projectors

    @property
    def rows(self) -> tuple[str, ...]:
        """The names from `SETTINGS` that this model can answer in."""
        # A base model was never tuned.
        if self._projectors is None:
            return ("full", "free")

        # Both other settings need the base's projector, which an export lacks.
        return ("tuned",) if self._projectors.base is None else SETTINGS

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        base: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> Self:
        """Load a run, an export or a base model.

        A run has all settings. An export has only "tuned", because it holds no other projector. A
        base model has the other two.

        Args:
            source: a run folder, or the folder or hub id of an export or of a base model.
            base: where a run's base model is now, if it has moved since the run.
            dtype: of the frozen weights, which are read as in the run, and then cast. The default
                is the precision of the run, or bfloat16 for a base model.
            device: by default a GPU if there is one.

        Raises:
            UserError: the source is neither a finished run nor a model, the base model can't be
                found, or it is not the one that the run was tuned on.
        """
        # The weights are read on the CPU, and moved once all of them are in place.
        folder = locate(source)
        if folder is None:
            comparison = cls._of_base(str(source), dtype=dtype or torch.bfloat16)
        else:
            comparison = cls._of_run(folder, base=base, dtype=dtype)

        comparison.family.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return comparison

    @classmethod
    def _of_base(cls, source: str, *, dtype: torch.dtype) -> Self:
        try:
            family_class = family_at(source)
        except OSError as error:
            raise UserError(
                f"{source} is neither a run folder nor a model that can be loaded: {error}; give one of these"
            ) from error
        return cls(*_load_base(family_class, source, dtype=dtype))

    @classmethod
    def _of_run(cls, folder: Path, *, base: str | None, dtype: torch.dtype | None) -> Self:
        meta = read_meta(folder)
        family, processor = _load_base_of_run(folder, meta, base=base)
        reducers = {}
        for reducer in reducers_of(meta).values():
            reducers[budget_of(family, reducer)] = reducer

        # The base is compared with the run's before a cast, which would round its weights.
        check_fits(meta, family, next(iter(reducers.values())))
        if dtype is not None:
            _cast(family, dtype)

        template = template_of(meta, source=folder)
        # Captions are not a conversation, so that format has no chat template.
        if not template.captions:
            processor.chat_template = chat_template(template, processor.tokenizer)

        # The projectors come first, because LoRA renames the parameters that it is put beside.
        projectors = _read_projectors(family, folder, meta)
        adapter = load_adapter(family, folder, meta) if meta["adapter"] else None
        return cls(
            family,
            processor,
            reducers=reducers,
            meta=meta,
            projectors=projectors,
            adapter=adapter,
        )

    def reducer(self, row: str, *, budget: int | None = None) -> Reducer:
        """The reducer of a setting.

        Args:
            row: one of `rows`.
            budget: by default the first of the run's. "free" takes any budget, "tuned" one that it
                was tuned for.

        Raises:
            UserError: the model lacks the setting, or the setting can't have the budget.
        """
        if row not in self.rows:
            raise UserError(
                f"row={row!r} does not exist here{self._why_missing(row)}; "
                f"choose one of: {', '.join(self.rows)}"
            )
        if row == "full":
            return Identity()

        # Without a run there is no first budget that could be the default.
        if not self.reducers:
            if budget is None:
                raise UserError("a base model needs a budget: give budget=..., e.g. budget=64")
            return VisionZip(budget=budget, tiles=self.family.budget_tiles)

        # Training-free has no projector of its own, so only "tuned" is bound to the run's budgets.
        if row == "tuned":
            check_tuned_budget(budget, self.reducers)
        first = next(iter(self.reducers.values()))
        if budget is None:
            return first
        if budget in self.reducers:
            return self.reducers[budget]

        # Another budget keeps the reducer's other settings, so that both can be compared.
        return with_budget(first, budget, tiles=self.family.budget_tiles)

    def _why_missing(self, row: str) -> str:
        """The reason why a run or an export lacks a setting; empty for an unknown one."""
        if row not in ("full", "free"):
            return ""
        if self.meta["base"]["projector"]:
            return "; the projector that training started from is no longer where it was"
        return "; an export holds the tuned projector alone: open the run"

    def attach(self, row: str, *, budget: int | None = None) -> Handle:
        """Put the model into a setting, and leave it there; returns the handle of its reducer.

        LoRA stays active: use `row` for settings without it. Raises UserError as `reducer`.
        """
        reducer = self.reducer(row, budget=budget)
        handle = Handle(self.family.model, reducer, anyres=self.family.anyres)

        # A base model has only its own projector, which is in place already.
        projectors = self._projectors
        if projectors is not None:
            weights = projectors.tuned if row == "tuned" else projectors.base
            assert weights is not None

            # Values are copied into the parameters, which LoRA and the reducer's handle refer to.
            with torch.no_grad():
                for name, value in weights.items():
                    projectors.parameters[name].copy_(value)
        return handle

    @contextmanager
    def row(self, row: str, *, budget: int | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield (model, processor) of a setting while the block runs.

        Raises:
            UserError: as `reducer`.
        """
        # LoRA was tuned too, so the settings before tuning must not have it.
        hides_adapter = self.adapter is not None and row != "tuned"
        without_adapter = self.adapter.disable_adapter() if hides_adapter else nullcontext()
        with self.attach(row, budget=budget) as handle, without_adapter:
            yield handle.family.model, handle.processor(self.processor)


def load(
    path: str | Path,
    *,
    budget: int | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """Load a run or an export: the model, reduced, with the tuned projector, and its processor.

    The model is ready to generate.

    Args:
        path: a run folder, or the folder or hub id of an export.
        budget: one that the run was tuned for, by default its first.
        base: where the base model is now (a folder or hub id), if it has moved since the run.
        dtype: of the frozen weights; by default as in the run.
        device: by default a GPU if there is one.

    Raises:
        UserError: the path is not a finished run, the run was not tuned for the budget, the base
            model can't be found, or it is not the one that the run was tuned on.
    """
    # A wrong budget is refused before anything large is loaded.
    meta = read_meta(locate(path) or Path(path))
    check_tuned_budget(budget, reducers_of(meta))

    comparison = Comparison.open(path, base=base, dtype=dtype, device=device)
    handle = comparison.attach("tuned", budget=budget)
    return handle.family.model, handle.processor(comparison.processor)
