"""Projector checkpoints: `projector.safetensors` has the projector, `meta.json` what it belongs to.

An export in the format of `transformers` has the same file beside its other weights, and the
content of meta.json in its `config.json`, see `vzip.runs.meta`. Nothing is ever unpickled, and a
projector is never put onto another base model, reducer or budget than it was trained with.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vzip.checkpoints.original.renaming import read_projector
from vzip.checkpoints.shards import check_all_finite
from vzip.errors import UserError
from vzip.families import Family
from vzip.files import atomic_write, sha256_of, write_json
from vzip.handle import Handle
from vzip.reducers import Reducer
from vzip.runs.adapter import load_adapter
from vzip.runs.meta import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    FORMAT,
    META,
    WEIGHTS,
    anyres_of,
    check_sum,
    read_meta,
    reducers_of,
)

_NUM_SAMPLES = 16
"""Values of each tensor that a fingerprint of the first version covers."""

_SECOND_VERSION = "2-"
"""Start of a fingerprint of the second version, which covers all values."""


# The model that a projector belongs to


def fingerprint(family: Family) -> str:
    """Identify the base model: a sha256 of its tensors, without the projector.

    It covers the names, the shapes and the sums of the tensors. Values are taken as bfloat16, so
    that the precision in which the model was loaded does not matter.
    """
    return _SECOND_VERSION + _base_digest(family, _sum_of_bits)


def _same_base(recorded: str, family: Family) -> bool:
    """Whether a recorded fingerprint is that of the model."""
    # Runs of older versions have fingerprints of the first version, which covers some values.
    if recorded.startswith(_SECOND_VERSION):
        return recorded == fingerprint(family)
    return recorded == _base_digest(family, _sample)


def _base_digest(family: Family, summary: Callable[[Tensor], bytes]) -> str:
    """Compute a sha256 of the names, the shapes and a summary of the base model's tensors."""
    # Sorted by name, because another version of transformers may list parameters in another order.
    digest = hashlib.sha256()
    for name, tensor in sorted(family.model.named_parameters()):
        # Tuning changes the projector, and must not change the fingerprint.
        if name.startswith(family.projector_names):
            continue

        # A model on the meta device has shapes but no values.
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(summary(tensor.detach().flatten()))
    return digest.hexdigest()


def _sum_of_bits(values: Tensor) -> bytes:
    """Add up the bits of all values, as whole numbers of 64 bits. Any changed value changes it."""
    # This reads as fast as the memory is: a second for 14 GB, where sha256 takes eight.
    bits = values.to(torch.bfloat16).contiguous().view(torch.int16)
    if bits.storage_offset() % 4:
        bits = bits.clone()

    # Four values at a time. What remains is added by itself.
    whole = bits.numel() // 4 * 4
    total = int(bits[:whole].view(torch.int64).sum())
    rest = int(bits[whole:].sum(dtype=torch.int64))
    return f"{total} {rest}".encode()


def _sample(values: Tensor) -> bytes:
    """Pick a few values, the summary of the first version."""
    values = values[:: max(1, values.numel() // _NUM_SAMPLES)][:_NUM_SAMPLES]
    return values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def projector_parameters(family: Family) -> dict[str, nn.Parameter]:
    """The projector's parameters, by their names in the model."""
    parameters = family.model.named_parameters()
    return {name: value for name, value in parameters if name.startswith(family.projector_names)}


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
    aspect_ratio: str | None = None,
) -> dict[str, Any]:
    """Make the part of meta.json that says what a projector belongs to.

    Args:
        family: the model.
        reducers: those that the projector is tuned for. Their budgets differ.
        base: folder or hub id of the base model.
        base_fingerprint: its `fingerprint`.
        projector: the file of the projector that training starts from, if it is not the base's own.
        aspect_ratio: what `vzip.media.image_aspect_ratio` says of the processor.
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
        "image_aspect_ratio": aspect_ratio,
        "budget": budgets[0],
        "reducer": descriptions[0],
        "other_budgets": {str(budget): description for budget, description in others},
    }


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the weights, and meta.json with their sums.

    With LoRA, the adapter must be in the folder already, because its sum is recorded too.

    Raises:
        UserError: a value is not finite. Then nothing is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    check_all_finite(on_cpu, source=f"the tuned projector of {folder}", advice="lower optim.lr")
    with atomic_write(folder / WEIGHTS) as scratch:
        save_file(on_cpu, scratch)

    # meta.json comes last: a folder that has it is complete.
    sums = {WEIGHTS: sha256_of(folder / WEIGHTS)}
    adapter = f"{ADAPTER}/{ADAPTER_WEIGHTS}"
    if meta["adapter"]:
        sums[adapter] = sha256_of(folder / adapter)
    write_json(folder / META, {**meta, "sha256": sums})


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
    if not _same_base(base["fingerprint"], family):
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
        UserError: the file can't be read, its names or shapes are not the projector's, or a value
            is not finite.
    """
    _copy_weights(family, _read_fitting(family, Path(path)))


def load_tuned(family: Family, folder: Path, meta: Mapping[str, Any]) -> None:
    """Copy the tuned projector of a run or an export into the model.

    Raises:
        UserError: as `load_weights`, and for a file that was not written with this meta.json.
    """
    # A sum that differs says less than a file that can't be read, so it is compared last.
    tensors = _read_fitting(family, folder / WEIGHTS)
    check_sum(folder, meta, WEIGHTS)
    _copy_weights(family, tensors)


def _read_fitting(family: Family, path: Path) -> dict[str, Tensor]:
    """Read a projector's file. Raises UserError if the model can't take it."""
    # Everything is compared before anything is copied: a refusal leaves the model as it was.
    tensors = read_projector(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    expected = {name: tuple(value.shape) for name, value in projector_parameters(family).items()}
    if shapes != expected:
        raise UserError(
            f"projector {path} does not fit the model: it holds {shapes}, "
            f"the model's projector is {expected}; give a projector of this model"
        )
    check_all_finite(tensors, source=f"projector {path}", advice="give a projector without such values")
    return tensors


@torch.no_grad()
def _copy_weights(family: Family, tensors: Mapping[str, Tensor]) -> None:
    parameters = projector_parameters(family)
    for name, value in tensors.items():
        parameters[name].copy_(value)


def load_projector(handle: Handle, folder: str | Path) -> None:
    """Put the tuned projector of a run into an attached model.

    Raises:
        UserError: the folder is not a finished run, its projector belongs to another base model,
            reducer or budget, or its weights are damaged.
    """
    # Everything is checked before the first weight changes.
    folder = Path(folder)
    meta = read_meta(folder)
    check_fits(meta, handle.family, handle.reducer)
    load_tuned(handle.family, folder, meta)
    if meta["adapter"]:
        load_adapter(handle.family, folder, meta)

    # The handle refuses a processor that shows other pictures than the projector has adapted to.
    handle.aspect_ratio = meta.get("image_aspect_ratio")
