"""Projector checkpoints: `projector.safetensors` holds the projector, `meta.json` says what it belongs to.

An export in the format of `transformers` has the same file beside its other weights, and the same description under the key
`EXPORT` of its `config.json`. Nothing is ever unpickled, and a projector is never put onto another base model, reducer or
budget than it was trained with.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from vzip.handle import Handle
from vzip.checkpoints.original.renaming import read_projector
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError, check_package
from vzip.families import Family
from vzip.reducers import Reducer, create

FORMAT = 1
WEIGHTS, META, ADAPTER, RESULT = "projector.safetensors", "meta.json", "adapter", "result.json"
CONFIG, EXPORT = "config.json", "vzip"
_SAMPLES = 16
_REQUIRED = ("base.id", "base.model_type", "base.fingerprint", "reducer.name", "dtype", "adapter")
"""What every description has."""


def fingerprint(family: Family) -> str:
    """sha256 of the names, shapes and some values of every tensor but the projector's: the base model's identity.

    Values are compared as bfloat16, so the precision that the model was loaded in does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(family.model.named_parameters()):
        if name.startswith(family.projector_name):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            values = tensor.detach().flatten()
            values = values[:: max(1, values.numel() // _SAMPLES)][:_SAMPLES]
            digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def budget_of(family: Family, reducer: Reducer) -> int:
    """What `budget` counts, of any reducer: the tokens of as many pictures as the family's budgets are the total of."""
    return family.num_tile_tokens(reducer) * family.budget_tiles


def projector_meta(
    family: Family, *reducers: Reducer, base: str, base_fingerprint: str, projector: str | None = None
) -> dict[str, Any]:
    """The part of `meta.json` that says what a projector belongs to: the base, with the file of the projector that training
    started from, where that is not the base's own; the first reducer, and the others by their budgets.
    """
    by_budget = {budget_of(family, reducer): family.describe_reduction(reducer) for reducer in reducers}
    assert len(by_budget) == len(reducers), f"two of the reducers {reducers} have the same budget"
    (budget, first), *others = by_budget.items()
    return {
        "format": FORMAT,
        "base": {"id": base, "model_type": family.model_type, "fingerprint": base_fingerprint, "projector": projector},
        "budget": budget,
        "reducer": first,
        "other_budgets": {str(budget): reducer for budget, reducer in others},
    }


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write both files, each beside its place first, so that a full disk or a kill leaves the old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = folder / f"{WEIGHTS}.tmp", folder / f"{META}.tmp"
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, weights)
    description.write_text(json.dumps(meta, indent=2))
    weights.replace(folder / WEIGHTS)
    description.replace(folder / META)


def locate(source: str | Path) -> Path | None:
    """The folder of a run, or of an export, which may be a hub id; None for anything else.

    Raises UserError for a path that leads nowhere and can't be a hub id, which ME/NAME can, though there is a folder ME.
    """
    folder = Path(source)
    is_path = folder.is_absolute() or str(source).startswith(".") or any(folder.parent.glob("*/config.yaml"))
    if (is_path or len(folder.parts) == 1) and not folder.exists():
        name = folder.name or "my-run"
        raise UserError(f"{source} does not exist; give a run folder, e.g. runs/{name}, or the folder or hub id of a model")
    if folder.is_dir() and not (folder / CONFIG).is_file():
        return folder
    try:
        is_export = EXPORT in read_config(str(source))
        return (folder if folder.is_dir() else Path(snapshot_download(str(source)))) if is_export else None
    except OSError:
        return None


def is_export(folder: Path) -> bool:
    """Whether a folder is an export in the format of `transformers`, and not a run."""
    return (folder / CONFIG).is_file() and EXPORT in _read_json(folder / CONFIG)


def _read_json(path: Path) -> Any:
    """Raises UserError for a file that is not JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error


def _lacks(meta: Any, name: str) -> bool:
    """Whether an entry, such as "base.id", is not there."""
    for key in name.split("."):
        if not isinstance(meta, dict) or key not in meta:
            return True
        meta = meta[key]
    return False


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` of a run says, or `config.json` of an export. Raises UserError for a folder that is neither, or a run
    that has not finished.
    """
    exported = is_export(folder)
    path = folder / (CONFIG if exported else META)
    if not path.is_file():
        state = "is a run that has not finished" if (folder / "config.yaml").is_file() else "is not a run folder"
        raise UserError(f"{folder} {state}: it has no {META}; give the folder of a finished run, e.g. runs/my-run")
    meta: dict[str, Any] = _read_json(path)[EXPORT] if exported else _read_json(path)
    form = meta.get("format") if isinstance(meta, dict) else meta
    if form != FORMAT:
        raise UserError(f"{path}: format {form!r} is unknown; this version reads format {FORMAT}")
    if missing := [name for name in _REQUIRED if _lacks(meta, name)]:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is not what a run wrote: restore it, or tune again")
    return meta


def read_finished(run: Path) -> dict[str, Any]:
    """`read_meta`, of a run that has its results too. Raises UserError also for one that was stopped before them."""
    meta = read_meta(run)
    if (run / "config.yaml").is_file() and not (run / RESULT).is_file():
        raise UserError(f"{run} is a run that has not finished: it has no {RESULT}; run its command again, which resumes it")
    return meta


def check_fits(meta: Mapping[str, Any], family: Family, reducer: Reducer) -> None:
    """Raises UserError, with the reason, if a projector of `meta` does not belong to this model and reducer."""
    base = meta["base"]
    if base["model_type"] != family.model_type:
        raise UserError(f"this projector was trained for a {base['model_type']!r} model, not for {family.model_type!r}")
    if base["fingerprint"] != fingerprint(family):
        raise UserError(
            f"this projector was trained on another base model ({base['id']}): the frozen weights differ; load that base"
        )
    recorded = list(reducers_of(meta).values())
    if (reducer.name, reducer.settings()) not in [(each.name, each.settings()) for each in recorded]:
        trained = " or ".join(map(repr, recorded))
        raise UserError(
            f"this projector was trained with the reducer {trained}, not with {reducer}; attach what it was trained with"
        )
    if "anyres" in family.describe_reduction(reducer) and family.anyres != anyres_of(meta):
        raise UserError(
            f"this projector was trained with reducer.anyres={anyres_of(meta)}, not with {family.anyres}; "
            f"attach with anyres={anyres_of(meta)!r}"
        )


def anyres_of(meta: Mapping[str, Any]) -> str:
    """The order of tiles that a `meta.json` records. It stands beside the reducer's own settings."""
    order: str = meta["reducer"].get("anyres", "released")
    return order


def reducers_of(meta: Mapping[str, Any]) -> dict[int | None, Reducer]:
    """The reducers of a `meta.json` by budget, the first one first; None for one that was written before budgets were. A
    setting that was unknown when the file was written has its default.
    """
    described = {meta.get("budget"): meta["reducer"]}
    described |= {int(budget): reducer for budget, reducer in meta.get("other_budgets", {}).items()}
    reducers = {}
    for budget, reducer in described.items():
        settings = dict(reducer)
        settings.pop("anyres", None)
        reducers[budget] = create(settings.pop("name"), settings)
    return reducers


def load_weights(family: Family, path: str | Path) -> None:
    """Put a projector's file into the model: ours, with the model's names, or LLaVA's `mm_projector.bin` or safetensors.

    Raises:
        UserError: no such file, one that can't be read, or names or shapes that are not the projector's.
    """
    tensors = read_projector(Path(path))
    parameters = dict(family.model.named_parameters())
    expected = {name: tuple(value.shape) for name, value in parameters.items() if name.startswith(family.projector_name)}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise UserError(f"projector {path} does not fit the model: it holds {found}, the model's projector is {expected}")
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def load_projector(handle: Handle, folder: str | Path) -> None:
    """Put the tuned projector of a run into an attached model.

    Raises:
        UserError: not a finished run, or one of another base model, reducer or budget.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    check_fits(meta, handle.family, handle.reducer)
    load_weights(handle.family, folder / WEIGHTS)
    if meta["adapter"]:
        load_adapter(handle.family, folder)


def load_adapter(family: Family, folder: Path) -> Any:
    """Put the LoRA of a run into its model, in place: peft's model around it. Raises UserError without peft."""
    check_package("peft", extra="train", purpose=f"loading the LoRA weights in {folder / ADAPTER}")
    from peft import PeftModel

    return PeftModel.from_pretrained(family.model, str(folder / ADAPTER))
