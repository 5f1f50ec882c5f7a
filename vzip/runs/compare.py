"""A model in the rows of a results table: `full`, `free` and `tuned`. Its frozen weights are there once."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vzip.handle import Handle
from vzip.templates.jinja import chat_template
from vzip.errors import UserError
from vzip.families import Family, families, family_at
from vzip.runs.projector import (
    WEIGHTS,
    anyres_of,
    budget_of,
    is_export,
    load_adapter,
    load_weights,
    locate,
    read_meta,
    reducers_of,
    check_fits,
)
from vzip.reducers import Reducer, with_budget
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import Template

ROWS = ("full", "free", "tuned")
"""All tokens and the projector of the base model; reduced, with the same projector; reduced, with the tuned projector."""


_ELSEWHERE = "Pass base=... (for a command --base) with its folder or hub id"


def _load_base(
    cls: type[Family], source: str, *, dtype: torch.dtype, anyres: str = "released", way_out: str = _ELSEWHERE
) -> tuple[Family, Any]:
    """(family around the model, processor), the projector in float32."""
    try:
        model, processor = cls.load_model(source, dtype=dtype), cls.load_processor(source)
    except (OSError, UserError) as error:
        raise UserError(f"the base model {source} can't be loaded: {error}\n{way_out}") from error
    family = cls(model.eval().requires_grad_(False), anyres=anyres)
    family.projector.float()
    return family, processor


def check_tuned_budget(budget: int | None, tuned: Collection[int | None]) -> None:
    """Raises UserError for a budget that is not among those that a projector was tuned for; None is the first of them."""
    if budget is not None and budget not in tuned:
        known = ", ".join(map(str, tuned))
        raise UserError(f"this projector was not tuned for budget={budget!r}, but for {known}; give one that it was tuned for")


def _cast(family: Family, dtype: torch.dtype) -> None:
    """Cast the frozen parameters; buffers, such as the frequencies of positions, keep the precision that they were made in."""
    for name, parameter in family.model.named_parameters():
        if not name.startswith(family.projector_name):
            parameter.data = parameter.data.to(dtype)


def _template_of(folder: Path, described: Mapping[str, Any]) -> Template:
    """Raises UserError for one that no version wrote."""
    try:
        return Template(**described)
    except TypeError as error:
        raise UserError(f"{folder}: its template {described} is unknown: {error}; restore the file, or tune again") from error


class Comparison:
    """One base model, and the rows in which it can answer.

    Attributes:
        family: around the model, which is the base model outside `row`.
        processor: the base model's, with the chat template that the projector was tuned with.
        rows: those of `ROWS` that there are.
        reducers: those of a run by budget, the first one first; none of a base model.
        meta: what `vzip.runs.projector.read_meta` says of a run, or of an export; empty of a base model.
    """

    def __init__(self, family: Family, processor: Any, *, reducers: Mapping[int, Reducer]) -> None:
        self.family, self.processor, self.reducers = family, processor, dict(reducers)
        self.rows: tuple[str, ...] = ("full", "free")
        self.meta: dict[str, Any] = {}
        self._projector = {name: p for name, p in family.model.named_parameters() if name.startswith(family.projector_name)}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._adapter: Any = None

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        base: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> Self:
        """The rows of a run folder; `tuned` alone of an export, which holds no other projector; the other two of a base model.

        Args:
            source: a run folder; or the folder or hub id of an export, or of a base model.
            base: where a run's base model is now, if not where the run found it.
            dtype: of the frozen weights, which are read as in the run, and then cast; by default as in the run, and bfloat16 of
                a base model.
            device: by default a GPU if there is one.

        Raises:
            UserError: not a finished run, nor a model; a base model that can't be found, or one that is not the run's.
        """
        folder = locate(source)
        made = cls._of_run(folder, base=base, dtype=dtype) if folder else cls._of_base(str(source), dtype=dtype)
        made.family.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return made

    @classmethod
    def _of_base(cls, source: str, *, dtype: torch.dtype | None) -> Self:
        try:
            family = family_at(source)
        except OSError as error:
            raise UserError(f"{source} is neither a run folder nor a model that can be loaded: {error}") from error
        return cls(*_load_base(family, source, dtype=dtype or torch.bfloat16), reducers={})

    @classmethod
    def _of_run(cls, folder: Path, *, base: str | None, dtype: torch.dtype | None) -> Self:
        meta = read_meta(folder)
        source, way_out = base or meta["base"]["id"], _ELSEWHERE
        if is_export(folder):
            if base is not None:
                raise UserError(f"base={base}: {folder} is an export, which holds its base model; leave base out")
            source, way_out = str(folder), "Export the run again, with --copy where the base model's own files may go"
        kind = families().get(meta["base"]["model_type"])
        if kind is None:
            raise UserError(f"{folder} is of the family {meta['base']['model_type']!r}, which this version does not know")
        dtype_of_run, anyres = getattr(torch, meta["dtype"]), anyres_of(meta)
        family, processor = _load_base(kind, source, dtype=dtype_of_run, anyres=anyres, way_out=way_out)
        reducers = {budget_of(family, reducer): reducer for reducer in reducers_of(meta).values()}
        check_fits(meta, family, next(iter(reducers.values())))  # before a cast, which would round what is compared
        if dtype is not None:
            _cast(family, dtype)
        if described := meta.get("template"):
            template = _template_of(folder, described)
            if not template.captions:
                processor.chat_template = chat_template(template, processor.tokenizer)
        made = cls(family, processor, reducers=reducers)
        made.meta = meta
        made._take_projectors(folder, meta)
        return made

    def _take_projectors(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """Keep the projector that training started from, where it is still there, and the tuned one."""
        start = meta["base"].get("projector")
        if not is_export(folder) and (start is None or Path(start).is_file()):
            if start is not None:
                load_weights(self.family, start)
            self._weights["base"] = self._copy_projector()
            self.rows = ROWS
        else:
            self.rows = ("tuned",)
        load_weights(self.family, folder / WEIGHTS)
        self._weights["tuned"] = self._copy_projector()
        if meta["adapter"]:
            self._adapter = load_adapter(self.family, folder)

    def _copy_projector(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._projector.items()}

    def reducer(self, row: str, *, budget: int | None = None) -> Reducer:
        """What reduces in a row. By default the first of the run's; `free` takes any budget, `tuned` one it was tuned for.

        Raises:
            UserError: a row that there is not, or a budget that it can't have.
        """
        if row not in self.rows:
            raise UserError(f"row={row!r} does not exist here{self._missing(row)}; choose one of: {', '.join(self.rows)}")
        if row == "full":
            return Identity()
        if budget is None and not self.reducers:
            raise UserError("a base model needs a budget: give budget=..., e.g. budget=64")
        if budget is None or budget in self.reducers:
            return self.reducers[budget] if budget else next(iter(self.reducers.values()))
        if row == "tuned":
            check_tuned_budget(budget, self.reducers)
        tiles = self.family.budget_tiles
        if not self.reducers:
            return VisionZip(budget=budget, tiles=tiles)
        return with_budget(next(iter(self.reducers.values())), budget, tiles=tiles)

    def _missing(self, row: str) -> str:
        """Why there is no such row."""
        if row not in ROWS[:2]:
            return ""
        if self.meta["base"].get("projector"):
            return "; the projector that training started from is no longer where it was"
        return "; an export holds the tuned projector alone: open the run"

    def attach(self, row: str, *, budget: int | None = None) -> Handle:
        """Make the model that row, and leave it so: the handle of its reducer. Raises UserError as `reducer`."""
        handle = Handle(self.family.model, self.reducer(row, budget=budget), anyres=self.family.anyres)
        weights = self._weights.get("tuned" if row == "tuned" else "base", {})
        with torch.no_grad():
            for name, value in weights.items():
                self._projector[name].copy_(value)
        return handle

    def tuned_family(self) -> Family:
        """Around the tuned model without a reducer, LoRA merged into its weights. The other rows are gone then."""
        self.attach("tuned").detach()
        if self._adapter:
            self._adapter.merge_and_unload()
            self._adapter = None
        self.rows = ("tuned",)
        return self.family

    @contextmanager
    def row(self, row: str, *, budget: int | None = None) -> Iterator[tuple[Any, Any]]:
        """(model, processor) of a row, while the block runs. Raises UserError as `reducer`."""
        without = self._adapter.disable_adapter() if self._adapter and row != "tuned" else nullcontext()
        with self.attach(row, budget=budget) as handle, without:
            yield handle.family.model, handle.processor(self.processor)


def load(
    path: str | Path,
    *,
    budget: int | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """(model, processor) of a run or an export: base model, reducer attached, tuned projector in place, ready to generate.

    Args:
        path: a run folder; or the folder or hub id of an export.
        budget: one that the run was tuned for, by default its first.
        base: where the base model is now (a folder or hub id), if not where the run found it.
        dtype: of the frozen weights; by default as in the run.
        device: by default a GPU if there is one.

    Raises:
        UserError: not a finished run, a budget that it was not tuned for, a base model that can't be found, or one that is
            not the run's.
    """
    known = reducers_of(read_meta(locate(path) or Path(path)))
    if None not in known:  # a file written before budgets were says nothing, so that the model has to be asked
        check_tuned_budget(budget, known)
    comparison = Comparison.open(path, base=base, dtype=dtype, device=device)
    handle = comparison.attach("tuned", budget=budget)
    return handle.family.model, handle.processor(comparison.processor)
