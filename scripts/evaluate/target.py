"""What is evaluated: a run, an export, or a base model, and the rows of its table."""

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.paths import ROOT
from train import config
from vzip import UserError
from vzip.reducers.identity import Identity
from vzip.runs.projector import (
    ADAPTER,
    META,
    WEIGHTS,
    is_export,
    locate,
    read_finished,
    read_meta,
    reducers_of,
)

BATCH = 8
"""Questions answered at a time by a model; a run's are as many as after its tuning."""
LARGE = 2**28
"""Bytes from which on a file is known by its size and time: reading a model's weights takes minutes."""


@dataclass(frozen=True)
class EvaluationSetting:
    """A row of the table."""

    name: str
    row: str
    budget: int | None


def _config_name(row: str, budgets: Sequence[int | None]) -> list[EvaluationSetting]:
    return [
        EvaluationSetting(row if len(budgets) == 1 else f"{row}-{budget}", row, budget) for budget in budgets
    ]


def rows_of_run(run: Path) -> list[EvaluationSetting]:
    """Raises UserError for a folder that is no finished run."""
    meta = read_finished(run)
    reducers = reducers_of(meta)
    rows, start = _config_name("tuned", list(reducers)), meta["base"].get("projector")
    if start is not None and not Path(start).is_file():
        print(f"rows full and free are left out: {start}, from which training started, is no longer there")
        return rows
    free = [] if isinstance(next(iter(reducers.values())), Identity) else _config_name("free", list(reducers))
    return [EvaluationSetting("full", "full", None), *free, *rows]


def digest(paths: Iterable[Path]) -> str:
    """Of the content of files; of large ones, of name, size and time."""
    found = hashlib.sha256()
    for path in paths:
        about = path.stat()
        large = f"{path.name} {about.st_size} {about.st_mtime_ns}".encode()
        found.update(path.read_bytes() if about.st_size < LARGE else large)
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Target:
    """What is evaluated."""

    rows: list[EvaluationSetting]
    folder: Path
    run: Path | None
    batch_size: int
    model: str
    """What other weights would change: a digest of the files; a hub id as it is."""
    names: list[str | None]
    """By which the paper's rows of the same model are found."""
    template: dict[str, Any] | None = None
    """That a base model is asked in; None where it has its own."""


def recipe_template(model: str) -> dict[str, Any] | None:
    """The template of the recipe for a model, by its id: a run of it is asked so, and so is what it is compared with."""
    config.register()
    for path in sorted((ROOT / "configs" / "model").glob("*.yaml")):
        own = OmegaConf.load(path).model
        if own.id == model:
            return asdict(config.instantiate_target(own.template))
    return None


def _of_model(arguments: argparse.Namespace, export: Path | None) -> Target:
    """An export, which has the row tuned alone; or a base model. Raises UserError for budgets that do not go with it."""
    source = str(arguments.source)
    if export is not None:
        meta = read_meta(export)
        rows, names = _config_name("tuned", list(reducers_of(meta))), [meta["base"]["id"]]
    elif arguments.budget:
        rows = [
            EvaluationSetting("full", "full", None),
            *(EvaluationSetting(f"free-{budget}", "free", budget) for budget in arguments.budget),
        ]
        names = [source]
    else:
        raise UserError(
            f"{source} is no run folder, whose budget would be known; give one, or, with a base model, e.g. --budget 64"
        )
    folder = arguments.out or ROOT / "runs" / "eval" / source.strip("/").replace("/", "--")
    files = (
        path
        for path in sorted(Path(source).glob("*"))
        if path.suffix in (".json", ".jinja", ".model", ".safetensors", ".bin")
    )
    model = digest(files) if Path(source).is_dir() else source
    template = recipe_template(source) if export is None else None
    return Target(rows, folder, None, arguments.batch_size or BATCH, model, names, template)


def subject_of(arguments: argparse.Namespace) -> Target:
    """Raises UserError for a folder that is neither a finished run nor a model, and for budgets that do not go with it."""
    run = locate(arguments.source)
    if run is not None and arguments.budget:
        raise UserError(
            f"--budget {arguments.budget[0]}: {run} is a run or an export, which has its own; leave --budget out"
        )
    if run is None or is_export(run):
        return _of_model(arguments, run)
    rows = rows_of_run(run)
    cfg = OmegaConf.load(run / "config.yaml") if (run / "config.yaml").is_file() else OmegaConf.create()
    batch = arguments.batch_size or OmegaConf.select(cfg, "evaluate.batch", default=BATCH)
    names = [OmegaConf.select(cfg, "model.name"), read_meta(run)["base"]["id"]]
    model = digest([run / WEIGHTS, run / META, *sorted((run / ADAPTER).glob("*"))])
    return Target(rows, arguments.out or run / "eval", run, batch, model, names)
