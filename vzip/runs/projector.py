"""Projector checkpoints: `projector.safetensors` has the projector, `meta.json` what it belongs to.

An export in the format of `transformers` has the same file beside its other weights, and the
content of meta.json under the key `EXPORT` of its `config.json`. Nothing is ever unpickled, and a
projector is never put onto another base model, reducer or budget than it was trained with.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn

from vzip.checkpoints.original.renaming import read_projector
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError, check_package
from vzip.families import Family
from vzip.handle import Handle
from vzip.reducers import Reducer, create

FORMAT = 1

WEIGHTS = "projector.safetensors"
META = "meta.json"
ADAPTER = "adapter"
RESULT = "result.json"
"""Files and the folder of a finished run."""

CONFIG = "config.json"
EXPORT = "vzip"
"""The file of an export that describes it, and the key of the description."""

_RUN_CONFIG = "config.yaml"
_REQUIRED = (
    "base.id",
    "base.model_type",
    "base.fingerprint",
    "base.projector",
    "reducer.name",
    "budget",
    "other_budgets",
    "template",
    "dtype",
    "adapter",
)
"""What meta.json of every run has."""

_NUM_SAMPLES = 16
"""Values of each tensor that a fingerprint covers."""


# The model that a projector belongs to


def fingerprint(family: Family) -> str:
    """Identify the base model: a sha256 of its tensors, without the projector.

    It covers the names, the shapes and some values of the tensors. Values are compared as bfloat16,
    so that the precision in which the model was loaded does not matter.
    """
    # Sorted by name, because another version of transformers may list parameters in another order.
    digest = hashlib.sha256()
    for name, tensor in sorted(family.model.named_parameters()):
        # Tuning changes the projector, and must not change the fingerprint.
        if name.startswith(family.projector_name):
            continue

        # A few values of each tensor are enough to tell two models apart, and take no time. A model
        # on the meta device has shapes but no values.
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            values = tensor.detach().flatten()
            values = values[:: max(1, values.numel() // _NUM_SAMPLES)][:_NUM_SAMPLES]
            digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def projector_parameters(family: Family) -> dict[str, nn.Parameter]:
    """The projector's parameters, by their names in the model."""
    parameters = family.model.named_parameters()
    return {name: value for name, value in parameters if name.startswith(family.projector_name)}


def budget_of(family: Family, reducer: Reducer) -> int:
    """The budget that a user gives for a reducer: its tokens for a tile, times `budget_tiles`."""
    return family.num_tile_tokens(reducer) * family.budget_tiles


# Writing


def projector_meta(
    family: Family,
    *reducers: Reducer,
    base: str,
    base_fingerprint: str,
    projector: str | None = None,
) -> dict[str, Any]:
    """Make the part of meta.json that says what a projector belongs to.

    Args:
        family: the model.
        reducers: those that the projector is tuned for. Their budgets differ.
        base: folder or hub id of the base model.
        base_fingerprint: its `fingerprint`.
        projector: the file of the projector that training starts from, if it is not the base's own.
    """
    # Two reducers with one budget could not be told apart in meta.json.
    budgets = [budget_of(family, reducer) for reducer in reducers]
    assert len(set(budgets)) == len(budgets), f"two of the reducers {reducers} have the same budget"

    # The first reducer is the default when the run is loaded.
    descriptions = [family.describe_reduction(reducer) for reducer in reducers]
    others = zip(budgets[1:], descriptions[1:], strict=True)
    return {
        "format": FORMAT,
        "base": {
            "id": base,
            "model_type": family.model_type,
            "fingerprint": base_fingerprint,
            "projector": projector,
        },
        "budget": budgets[0],
        "reducer": descriptions[0],
        "other_budgets": {str(budget): description for budget, description in others},
    }


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the weights and meta.json.

    Both are first written to other files, so that a full disk or a kill leaves the old ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new_weights = folder / f"{WEIGHTS}.tmp"
    new_meta = folder / f"{META}.tmp"

    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, new_weights)
    new_meta.write_text(json.dumps(meta, indent=2))

    # Each replacement is atomic. meta.json comes last: a folder that has it is complete.
    new_weights.replace(folder / WEIGHTS)
    new_meta.replace(folder / META)


# Finding and reading


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
    try:
        if EXPORT not in read_config(str(source)):
            return None
        return folder if folder.is_dir() else Path(snapshot_download(str(source)))
    except OSError:
        return None


def _read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error


def is_export(folder: Path) -> bool:
    """Whether a folder is an export in the format of `transformers`, and not a run."""
    return (folder / CONFIG).is_file() and EXPORT in _read_json(folder / CONFIG)


def _has_entry(meta: Any, name: str) -> bool:
    """Whether meta.json has an entry, such as "base.id"."""
    # A broken file may hold text or a number where an object is expected.
    for key in name.split("."):
        if not isinstance(meta, dict) or key not in meta:
            return False
        meta = meta[key]
    return True


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json of a run, or the same entries in config.json of an export.

    Raises:
        UserError: the folder is neither, the run did not finish, or the file is broken.
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
    content = _read_json(path)
    meta: dict[str, Any] = content[EXPORT] if exported else content
    form = meta.get("format") if isinstance(meta, dict) else meta
    if form != FORMAT:
        raise UserError(f"{path}: format {form!r} is unknown; this version reads format {FORMAT}")

    missing = [name for name in _REQUIRED if not _has_entry(meta, name)]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}, which every run writes; restore it, or tune again"
        )
    return meta


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


# Loading


def check_fits(meta: Mapping[str, Any], family: Family, reducer: Reducer) -> None:
    """Check that the projector of a meta.json belongs to a model and a reducer.

    Raises:
        UserError: the projector does not belong to them; the message has the reason.
    """
    # The type is compared first: it explains more than a fingerprint that differs.
    base = meta["base"]
    if base["model_type"] != family.model_type:
        raise UserError(
            f"this projector was trained for a {base['model_type']!r} model, "
            f"not for {family.model_type!r}; load it into a {base['model_type']!r} model"
        )
    if base["fingerprint"] != fingerprint(family):
        raise UserError(
            f"this projector was trained on another base model ({base['id']}): "
            "the frozen weights differ; load that base"
        )

    # All settings of the reducer have to be equal, because the projector has adapted to them.
    trained = list(reducers_of(meta).values())
    settings = [(each.name, each.settings()) for each in trained]
    if (reducer.name, reducer.settings()) not in settings:
        names = " or ".join(map(repr, trained))
        raise UserError(
            f"this projector was trained with the reducer {names}, not with {reducer}; "
            "attach what it was trained with"
        )

    # The projector has adapted to the order of tiles too, in families that cut pictures into tiles.
    orders_tiles = "anyres" in family.describe_reduction(reducer)
    if orders_tiles and family.anyres != anyres_of(meta):
        raise UserError(
            f"this projector was trained with reducer.anyres={anyres_of(meta)}, "
            f"not with {family.anyres}; attach with anyres={anyres_of(meta)!r}"
        )


def load_weights(family: Family, path: str | Path) -> None:
    """Copy a projector's file into the model.

    The file is ours, with the model's names, or LLaVA's `mm_projector.bin` or safetensors.

    Raises:
        UserError: the file can't be read, or its names or shapes are not the projector's.
    """
    # Everything is compared before anything is copied: a refusal leaves the model as it was.
    tensors = read_projector(Path(path))
    parameters = projector_parameters(family)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    if shapes != expected:
        raise UserError(
            f"projector {path} does not fit the model: it holds {shapes}, "
            f"the model's projector is {expected}; give a projector of this model"
        )

    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def load_projector(handle: Handle, folder: str | Path) -> None:
    """Put the tuned projector of a run into an attached model.

    Raises:
        UserError: the folder is not a finished run, or its projector belongs to another base model,
            reducer or budget.
    """
    # Everything is checked before the first weight changes.
    folder = Path(folder)
    meta = read_meta(folder)
    check_fits(meta, handle.family, handle.reducer)
    load_weights(handle.family, folder / WEIGHTS)
    if meta["adapter"]:
        load_adapter(handle.family, folder)


def load_adapter(family: Family, folder: Path) -> Any:
    """Put the LoRA of a run into its model, in place, and return peft's model around it.

    Raises:
        UserError: peft is not installed.
    """
    check_package("peft", extra="train", purpose=f"loading the LoRA weights in {folder / ADAPTER}")
    from peft import PeftModel

    return PeftModel.from_pretrained(family.model, str(folder / ADAPTER))
