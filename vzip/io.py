"""Projector checkpoints: `projector.safetensors` holds the projector, `meta.json` says what it belongs to.

Nothing is ever unpickled, and a projector is never put onto another base model, reducer or budget than it was trained with.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vzip.attach import Handle
from vzip.checkpoints.renaming import read_projector
from vzip.errors import UserError
from vzip.families import Family, families
from vzip.reducers import Reducer, create

FORMAT = 1
WEIGHTS, META, ADAPTER = "projector.safetensors", "meta.json", "adapter"
_SAMPLES = 16


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


def describe(family: Family, reducer: Reducer, *, base: str, base_fingerprint: str) -> dict[str, Any]:
    """The part of `meta.json` that `refuse_mismatch` compares."""
    return {
        "format": FORMAT,
        "base": {"id": base, "model_type": family.model_type, "fingerprint": base_fingerprint},
        "reducer": {"name": reducer.name, **reducer.settings()},
    }


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write both files, each beside its place first, so that a full disk or a kill leaves the old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = folder / f"{WEIGHTS}.tmp", folder / f"{META}.tmp"
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, weights)
    description.write_text(json.dumps(meta, indent=2))
    weights.replace(folder / WEIGHTS)
    description.replace(folder / META)


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of a run folder. Raises UserError for a folder that is not a finished run."""
    path = folder / META
    if not path.is_file():
        state = "is a run that has not finished" if (folder / "config.yaml").is_file() else "is not a run folder"
        raise UserError(f"{folder} {state}: it has no {META}; give the folder of a finished run, e.g. runs/my-run")
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    form = meta.get("format") if isinstance(meta, dict) else meta
    if form != FORMAT:
        raise UserError(f"{path}: format {form!r} is unknown; this version reads format {FORMAT}")
    if missing := {"base", "reducer", "dtype", "adapter"} - set(meta):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; it is not what a run wrote: restore it, or tune again")
    return meta


def refuse_mismatch(meta: Mapping[str, Any], family: Family, reducer: Reducer) -> None:
    """Raises UserError, with the reason, if a projector of `meta` does not belong to this model and reducer."""
    base = meta["base"]
    if base["model_type"] != family.model_type:
        raise UserError(f"this projector was trained for a {base['model_type']!r} model, not for {family.model_type!r}")
    if base["fingerprint"] != fingerprint(family):
        raise UserError(
            f"this projector was trained on another base model ({base['id']}): the frozen weights differ; load that base"
        )
    recorded = create_reducer(meta)
    if (recorded.name, recorded.settings()) != (reducer.name, reducer.settings()):
        raise UserError(f"this projector was trained with the reducer {recorded}, not with {reducer}; attach that one")


def create_reducer(meta: Mapping[str, Any]) -> Reducer:
    """The reducer of a `meta.json`; a setting that was unknown when it was written has its default."""
    settings = dict(meta["reducer"])
    return create(settings.pop("name"), settings)


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
    refuse_mismatch(meta, handle.family, handle.reducer)
    load_weights(handle.family, folder / WEIGHTS)
    if meta["adapter"]:
        _load_adapter(handle.family, folder / ADAPTER)


def _load_adapter(family: Family, folder: Path) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder} holds LoRA weights; `pip install peft` to load them")
    from peft import PeftModel

    PeftModel.from_pretrained(family.model, str(folder))  # changes the model in place


def load(
    path: str | Path, *, base: str | None = None, dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """(model, processor) of a run: base model, reducer attached, tuned projector in place, ready to generate.

    Args:
        path: a run folder.
        base: where the base model is now (a folder or hub id), if not where the run found it.
        dtype: of the frozen weights; by default as in the run.
        device: by default a GPU if there is one.

    Raises:
        UserError: not a finished run, a base model that can't be found, or one that is not the run's.
    """
    folder = Path(path)
    meta = read_meta(folder)
    source = base or meta["base"]["id"]
    cls = families().get(meta["base"]["model_type"])
    if cls is None:
        raise UserError(f"{folder} is of the family {meta['base']['model_type']!r}, which this version does not know")
    try:
        model = cls.load_model(source, dtype=dtype or getattr(torch, meta["dtype"]))
        processor = cls.load_processor(source)
    except OSError as error:
        raise UserError(f"the base model {source} can't be loaded: {error}\nPass base=... with its folder or hub id") from error
    handle = Handle(model, create_reducer(meta))
    handle.family.projector.float()
    load_projector(handle, folder)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval().requires_grad_(False), handle.processor(processor)
