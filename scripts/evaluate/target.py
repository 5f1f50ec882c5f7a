"""The target of an evaluation: a run, an export or a base model, and its settings."""

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.paths import ROOT
from train import config
from train.runs import FinishedRun
from vzip import UserError
from vzip.reducers.identity import Identity
from vzip.runs.meta import (
    ADAPTER,
    META,
    WEIGHTS,
    has_file,
    is_export,
    locate,
    read_finished,
    read_meta,
    reducers_of,
)

BATCH_SIZE = 8
"""Questions that a model answers at a time. For a run, the number is that after its tuning."""
LARGE_FILE = 2**28
"""Files from this size (bytes) are hashed by size and time: reading weights takes minutes."""
MODEL_FILES = (".json", ".jinja", ".model", ".safetensors", ".bin")
"""Suffixes of the files that a model's answers depend on."""


@dataclass(frozen=True)
class EvaluationSetting:
    """One setting of a model: one line of the results table."""

    name: str
    """Name in the table, e.g. "tuned-64"."""
    row: str
    """Setting of `vzip.Comparison`: "full", "free" or "tuned"."""
    budget: int | None


@dataclass(frozen=True)
class Target:
    """The model to evaluate, its settings, and the folder of the results."""

    settings: list[EvaluationSetting]
    folder: Path
    """Folder of the results."""
    run: Path | None
    """Folder of the run. None for an export or a base model."""
    batch_size: int
    model: str
    """Identity of the weights: a hash of the files, or the hub id."""
    names: list[str | None]
    """Names under which the paper may report the same model."""
    template: dict[str, Any] | None = None
    """Fields of a base model's chat template. None if its processor has one."""


FULL = EvaluationSetting("full", "full", None)


def _settings_by_budget(row: str, budgets: Sequence[int | None]) -> list[EvaluationSetting]:
    """List a setting with each budget.

    The budget is part of the name only if there are several.
    """
    if len(budgets) == 1:
        return [EvaluationSetting(row, row, budgets[0])]
    return [EvaluationSetting(f"{row}-{budget}", row, budget) for budget in budgets]


def settings_of_run(run: Path) -> list[EvaluationSetting]:
    """List the settings of a run. Raises UserError if the folder is not a finished run."""
    meta = read_finished(run)
    reducers = reducers_of(meta)
    budgets = list(reducers)
    tuned = _settings_by_budget("tuned", budgets)

    # The other settings need the projector from which training started.
    projector = meta["base"].get("projector")
    if projector is not None and not has_file(projector):
        print(
            f"full and training-free are left out: {projector}, from which training started, no longer exists"
        )
        return tuned

    # Without a reducer, training-free is the same as full.
    reduces = not isinstance(next(iter(reducers.values())), Identity)
    training_free = _settings_by_budget("free", budgets) if reduces else []
    return [FULL, *training_free, *tuned]


def digest(paths: Iterable[Path]) -> str:
    """Hash the content of files. Large files are hashed by name, size and time."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        if status.st_size < LARGE_FILE:
            digest.update(path.read_bytes())
        else:
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())

    return digest.hexdigest()[:16]


def recipe_template(model: str) -> dict[str, Any] | None:
    """Return the template of the recipe for a model's id, or None if there is no recipe.

    A run of the recipe uses this template, so the base model must use it too when the two are
    compared.
    """
    for path in sorted((ROOT / "configs" / "model").glob("*.yaml")):
        # The file of a model may inherit everything but its id from another one.
        if OmegaConf.to_container(OmegaConf.load(path).model)["id"] == model:
            cfg = config.compose_settings(f"model={path.stem}")
            return asdict(config.instantiate_target(cfg.model.template))

    return None


def _folder_of_model(arguments: argparse.Namespace) -> Path:
    """Return the folder of the results of a model or an export."""
    if arguments.out:
        folder: Path = arguments.out
        return folder

    # A hub id or a path becomes one folder name. Dots alone would lead out of the folder.
    name = str(arguments.source).strip("/").replace("/", "--")
    if not name.strip("."):
        name = Path(arguments.source).resolve().name or "root"
    return ROOT / "runs" / "eval" / name


def _identity_of_model(source: str) -> str:
    """Hash a model's files. A hub id stands for itself."""
    # With the path alone, a new model in the same folder would keep the old one's results.
    if not Path(source).is_dir():
        return source

    # A model card or a picture beside the weights changes no answer.
    files = [path for path in sorted(Path(source).glob("*")) if path.suffix in MODEL_FILES]
    return digest(path for path in files if path.is_file())


def _export_target(arguments: argparse.Namespace, export: Path) -> Target:
    """Make the target of an export. It has only the tuned projector, so "tuned" is its setting."""
    meta = read_meta(export)
    return Target(
        settings=_settings_by_budget("tuned", list(reducers_of(meta))),
        folder=_folder_of_model(arguments),
        run=None,
        batch_size=arguments.batch_size or BATCH_SIZE,
        model=_identity_of_model(arguments.source),
        names=[meta["base"]["id"]],
    )


def _base_model_target(arguments: argparse.Namespace) -> Target:
    """Make the target of a base model: full, and training-free with each budget.

    Raises:
        UserError: no budget is given.
    """
    source = str(arguments.source)
    if not arguments.budget:
        raise UserError(
            f"{source} is not a run folder, so its budget is not known; give a run folder, "
            "or add e.g. --budget 64"
        )

    # These names always have the budget, because the next command may give another one.
    training_free = []
    for budget in arguments.budget:
        training_free.append(EvaluationSetting(f"free-{budget}", "free", budget))
    return Target(
        settings=[FULL, *training_free],
        folder=_folder_of_model(arguments),
        run=None,
        batch_size=arguments.batch_size or BATCH_SIZE,
        model=_identity_of_model(source),
        names=[source],
        template=recipe_template(source),
    )


def _run_target(arguments: argparse.Namespace, run: Path) -> Target:
    """Make the target of a run, with all of its settings."""
    # This refuses a run that is not finished, so the files below exist.
    settings = settings_of_run(run)

    finished = FinishedRun(run)
    batch_size = BATCH_SIZE
    name = None
    if finished.has_settings:
        batch_size = finished.settings.evaluate.batch
        name = finished.setting("model.name")

    # A later check says what is wrong with a file that is missing.
    files = [run / WEIGHTS, run / META, *sorted((run / ADAPTER).glob("*"))]
    return Target(
        settings=settings,
        folder=arguments.out or finished.own_folder("eval"),
        run=run,
        batch_size=arguments.batch_size or batch_size,
        model=digest(path for path in files if path.is_file()),
        names=[name if isinstance(name, str) else None, read_meta(run)["base"]["id"]],
    )


def find_target(arguments: argparse.Namespace) -> Target:
    """Find the run, export or model that the arguments name.

    Raises:
        UserError: the source is neither a finished run nor a model, or --budget is missing or
            contradicts it.
    """
    # A folder or a hub id without a tuned projector is a base model.
    folder = locate(arguments.source)
    if folder is None:
        return _base_model_target(arguments)

    # Runs and exports record the budgets that they were tuned for.
    if arguments.budget:
        raise UserError(
            f"--budget {arguments.budget[0]}: {folder} is a run or an export, which has its own budgets; "
            "leave --budget out"
        )
    if is_export(folder):
        return _export_target(arguments, folder)
    return _run_target(arguments, folder)
