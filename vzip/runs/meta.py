"""Find the folder of a run or an export, and read what its projector belongs to.

A run has this in `meta.json`. An export in the format of `transformers` has the same content under
the key `EXPORT` of its `config.json`. Anybody may have written the files, so they are data: nothing
is built from them but the reducers and templates of this package.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from vzip.checkpoints.shards import read_config
from vzip.errors import UserError, check_choice
from vzip.families.anyres import ANYRES
from vzip.files import read_json_object, sha256_of
from vzip.media import ASPECT_RATIOS
from vzip.reducers import Reducer, create
from vzip.runs.schema import (
    COUNT,
    FLAG,
    NAMED_TEXTS,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
    check_entries,
)
from vzip.templates.encode import Template

FORMAT = 1

WEIGHTS = "projector.safetensors"
META = "meta.json"
ADAPTER = "adapter"
RESULT = "result.json"
"""Files and the folder of a finished run."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The file in `ADAPTER` that peft writes."""

CONFIG = "config.json"
EXPORT = "vzip"
"""The file of an export that describes it, and the key of the description."""

EXPORT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
"""Patterns of the files that an export consists of. Nothing else is downloaded from its repository."""

DTYPES = ("float32", "bfloat16", "float64")
"""Precisions that a run can have recorded."""

_RUN_CONFIG = "config.yaml"
_RESTORE = "restore it, or tune again"

_REQUIRED = {
    "base.id": TEXT,
    "base.model_type": TEXT,
    "base.fingerprint": TEXT,
    "base.projector": TEXT.or_null(),
    "reducer.name": TEXT,
    "budget": COUNT,
    "other_budgets": OBJECT,
    "template": OBJECT,
    "dtype": TEXT,
    "adapter": FLAG,
}
"""What meta.json of every run has."""

_OPTIONAL = {
    "reducer.anyres": TEXT,
    "image_aspect_ratio": TEXT.or_null(),
    "num_image_tokens": COUNT,
    "trained": TEXTS,
    "commit": TEXT.or_null(),
    "sha256": NAMED_TEXTS,
    "data": OBJECT.or_null(),
}
"""What it may have too."""

_REDUCER_REQUIRED = {"name": TEXT}
_REDUCER_OPTIONAL = {
    "anyres": TEXT,
    "budget": WHOLE,
    "dominant": WHOLE,
    "contextual": WHOLE,
    "keep": NUMBER.or_null(),
    "merge": TEXT.or_null(),
    "keep_cls": FLAG,
    "layer": WHOLE.or_null(),
    "object_layer": WHOLE.or_null(),
    "alpha": NUMBER,
    "temperature": NUMBER,
}
_TEMPLATE_KINDS: dict[Any, Kind] = {str: TEXT, bool: FLAG, tuple[str, ...]: TEXTS}
"""Kinds of the fields of a template, by their type."""


# Finding


def locate(source: str | Path) -> Path | None:
    """Find the folder of a run or of an export.

    Args:
        source: a folder, or the hub id of an export.

    Returns:
        The folder, or None for a base model.

    Raises:
        UserError: the path does not exist and can't be a hub id. A path like ME/NAME can be one,
            even if there is a folder ME, unless ME holds runs.
    """
    # A mistyped run folder must not be looked up on the hub, so find out whether this is a path.
    folder = Path(source)
    beside_runs = any(folder.parent.glob(f"*/{_RUN_CONFIG}"))
    is_path = folder.is_absolute() or str(source).startswith(".") or beside_runs
    if (is_path or len(folder.parts) == 1) and not folder.exists():
        name = folder.name or "my-run"
        raise UserError(
            f"{source} does not exist; give a run folder, e.g. runs/{name}, "
            "or the folder or hub id of a model"
        )

    # A folder without config.json is not a model, so it is a run, or refused as a run later.
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return folder

    # A model, here or on the hub. Its config.json tells whether it is an export.
    # Whoever loads a model without one says what is wrong with it.
    try:
        config = read_config(str(source))
    except OSError:
        return None
    if EXPORT not in config:
        return None
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=EXPORT_FILES))
    except OSError as error:
        raise UserError(
            f"the export {source} can't be downloaded: {error}; run the same command again, which goes on"
        ) from error


def is_export(folder: Path) -> bool:
    """Whether a folder is an export in the format of `transformers`, and not a run."""
    config = folder / CONFIG
    return config.is_file() and EXPORT in read_json_object(config, advice="get the whole folder again")


# Reading


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json of a run, or the same entries in config.json of an export.

    Raises:
        UserError: the folder is neither, the run did not finish, or the file is damaged.
    """
    exported = is_export(folder)
    path = folder / (CONFIG if exported else META)
    if not path.is_file():
        # A run writes config.yaml at its start, and meta.json with its tuned projector.
        is_run = (folder / _RUN_CONFIG).is_file()
        state = "is a run that has not finished" if is_run else "is not a run folder"
        raise UserError(
            f"{folder} {state}: it has no {META}; give the folder of a finished run, e.g. runs/my-run"
        )

    # The format is checked first: the entries of an unknown one may have other names.
    content = read_json_object(path, advice=_RESTORE)
    meta: dict[str, Any] = content[EXPORT] if exported else content
    form = meta.get("format") if isinstance(meta, dict) else None
    if type(form) is not int or form != FORMAT:
        raise UserError(f"{path}: format {form!r:.60} is unknown; this version reads format {FORMAT}")

    check_entries(meta, _REQUIRED, optional=_OPTIONAL, source=path, advice=_RESTORE)
    _check_values(meta, path)
    return meta


def _check_values(meta: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a value of the right kind that no run records."""
    check_choice(f"{path}: dtype", meta["dtype"], DTYPES)
    check_choice(f"{path}: reducer.anyres", anyres_of(meta), ANYRES)
    ratios = (None, *ASPECT_RATIOS)
    check_choice(f"{path}: image_aspect_ratio", meta.get("image_aspect_ratio"), ratios)

    # The budgets of further reducers are keys, so JSON holds them as texts.
    for budget in meta["other_budgets"]:
        is_count = budget.isascii() and budget.isdecimal() and len(budget) < 10 and int(budget) >= 1
        if not is_count:
            raise UserError(f"{path}: other_budgets has {budget[:60]!r}, which is no budget; {_RESTORE}")

    others = {f"other_budgets.{budget}": each for budget, each in meta["other_budgets"].items()}
    for entry, description in {"reducer": meta["reducer"], **others}.items():
        check_entries(
            description,
            _REDUCER_REQUIRED,
            optional=_REDUCER_OPTIONAL,
            source=f"{path}, {entry}",
            advice=_RESTORE,
        )
    # Older versions lack fields that have a default.
    template_fields = {each.name: _TEMPLATE_KINDS[each.type] for each in fields(Template)}
    required = {each.name: template_fields[each.name] for each in fields(Template) if each.default is MISSING}
    check_entries(
        meta["template"],
        required,
        optional=template_fields,
        source=f"{path}, template",
        advice=_RESTORE,
    )


def read_finished(run: Path) -> dict[str, Any]:
    """Read meta.json of a run that has its results too.

    Raises:
        UserError: as `read_meta`, and for a run that was stopped before its results.
    """
    meta = read_meta(run)

    # A projector that was copied without its run has no config.yaml, and needs no results.
    if (run / _RUN_CONFIG).is_file() and not (run / RESULT).is_file():
        raise UserError(
            f"{run} is a run that has not finished: it has no {RESULT}; "
            "run its command again, which resumes it"
        )
    return meta


# What a meta.json describes


def anyres_of(meta: Mapping[str, Any]) -> str:
    """The order of tiles that a meta.json records.

    It stands beside the reducer's own settings. The reducer `identity` has none, because it leaves
    the tiles in the model's own order.
    """
    order: str = meta["reducer"].get("anyres", "released")
    return order


def reducers_of(meta: Mapping[str, Any]) -> dict[int, Reducer]:
    """Make the reducers that a meta.json records, by budget, the first one first.

    Raises:
        UserError: a reducer or one of its settings is unknown.
    """
    descriptions = {meta["budget"]: meta["reducer"]}
    for budget, description in meta["other_budgets"].items():
        descriptions[int(budget)] = description

    reducers = {}
    for budget, description in descriptions.items():
        # The order of tiles is a setting of the family, not of the reducer.
        settings = dict(description)
        name = settings.pop("name")
        settings.pop("anyres", None)
        reducers[budget] = create(name, settings)
    return reducers


def has_file(path: str) -> bool:
    """Whether a path that a meta.json records is a file on this machine."""
    # A damaged path may be too long for the system, or hold a zero.
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def template_of(meta: Mapping[str, Any], *, source: Path) -> Template:
    """Make the template that a meta.json records.

    Args:
        meta: content of meta.json, from `read_meta`.
        source: its folder, for the message.

    Raises:
        UserError: this version knows no such template.
    """
    try:
        return Template(**meta["template"])
    except TypeError as error:
        raise UserError(f"{source}: its template is unknown: {error}; {_RESTORE}") from error


# Sums


def check_sum(folder: Path, meta: Mapping[str, Any], name: str) -> None:
    """Check a file of weights against the sha256 that a meta.json records.

    Folders of older versions record none, and are accepted.

    Args:
        folder: the folder of a run or an export.
        meta: its meta.json.
        name: path of the file in the folder, such as `WEIGHTS`.

    Raises:
        UserError: the file is not the one that was written with this meta.json.
    """
    recorded = meta.get("sha256", {}).get(name)
    if recorded is not None and recorded != sha256_of(folder / name):
        raise UserError(
            f"{folder / name} is damaged, or from another run: its sha256 is not the one in the "
            "folder's records; copy the whole folder again, or tune again"
        )
