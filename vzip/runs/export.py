"""Write a run's tuned model in other formats: for `transformers`, for LLaVA's own code, for peft.

Each `write_` function takes a finished run, an empty folder, and where the run's base model is now
if it has moved since the run. It raises UserError if the run is not a finished run, or the base
model is not the run's.

`write_hf` writes a complete model. The base's shards are linked where they hold no tensor of the
projector. The tuned projector gets a shard of its own, in float32, the precision of its training.
`from_pretrained` casts it to the model's precision (bfloat16 keeps 8 of its 24 bits), `vzip.load`
does not. `config.json` holds the entries of the run's meta.json under the key `vzip`.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vzip.checkpoints.shards import list_shards, read_config
from vzip.errors import UserError, check_package
from vzip.families import Family
from vzip.files import sha256_of
from vzip.media import image_aspect_ratio
from vzip.reducers import Reducer
from vzip.runs.compare import Comparison, check_tuned_budget
from vzip.runs.meta import ADAPTER, ADAPTER_WEIGHTS, CONFIG, EXPORT, WEIGHTS, is_export, read_finished
from vzip.runs.projector import fingerprint, projector_meta, projector_parameters
from vzip.runs.schema import ARCHITECTURE

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ONLY_SHARD = "model-00001-of-00001.safetensors"

MM_PROJECTOR = "mm_projector"
_LLAVA_NAMES = {
    "linear_1.weight": "0.weight",
    "linear_1.bias": "0.bias",
    "linear_2.weight": "2.weight",
    "linear_2.bias": "2.bias",
}
"""The parts of a projector, by our names, and their names in LLaVA's code."""


# The run


def _open(run: Path, base: str | None) -> tuple[Comparison, str]:
    """Open a finished run on the CPU; returns it with the folder or hub id of its base."""
    if is_export(run):
        raise UserError(f"{run} is an export itself; give the folder of the run that it was made from")

    # Refuse a run without results before its model is loaded, which takes minutes.
    read_finished(run)
    comparison = Comparison.open(run, base=base, device="cpu")
    return comparison, base or comparison.meta["base"]["id"]


def _merge(comparison: Comparison) -> Family:
    """Put the tuned projector into the model for good, without a reducer, and merge LoRA into it.

    The comparison is used up.
    """
    # Attaching copies the tuned projector into the model. Detaching takes away the reducer alone.
    comparison.attach("tuned").detach()
    if comparison.adapter is not None:
        comparison.adapter.merge_and_unload()
    return comparison.family


def _projector_copies(family: Family) -> dict[str, Tensor]:
    """Copies of the projector's tensors, by their names in the model."""
    tensors = {}
    for name, parameter in projector_parameters(family).items():
        tensors[name] = parameter.detach().clone().contiguous()
    return tensors


def base_name(base: str) -> str:
    """Return a name for a base model: its hub id, or the last part of its folder.

    Paths of one machine must not leak into an export.
    """
    path = Path(base)
    return path.resolve().name if path.is_dir() or path.is_absolute() else base


# transformers


def _base_shards(base: str, family_class: type[Family]) -> list[Path]:
    """The safetensors files of a base in the layout of `transformers`; empty for other layouts."""
    # The names of other layouts would have to be changed, so their shards can't be linked.
    original = family_class.original
    if original is not None and original.is_original(read_config(base)):
        return []

    folder = Path(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, allow_patterns=["model*.safetensors", INDEX]))

    # Only shards that the index names: a folder may hold files of an older save beside them.
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    return list_shards(folder / INDEX) if (folder / INDEX).is_file() else []


def _tensor_names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def _link(source: Path, target: Path) -> None:
    """Make a hard link, which outlives its source, or a symbolic one if the disk is another."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.symlink_to(source.resolve())


def _add_shard(shard: Path, folder: Path, projector_names: tuple[str, ...], *, copy: bool) -> None:
    """Link or copy a base's shard. If it holds tensors of the projector, write it without them."""
    target = folder / (ONLY_SHARD if shard.name == SINGLE else shard.name)
    names = _tensor_names(shard)
    others = []
    for name in names:
        # Before transformers 4.52 names lacked the leading "model.".
        if not f"model.{name.removeprefix('model.')}".startswith(projector_names):
            others.append(name)

    # The old projector must go: a reader that found two of them could take either.
    if len(others) < len(names):
        tensors = load_file(shard)
        save_file({name: tensors[name] for name in others}, target, metadata={"format": "pt"})
    elif copy:
        shutil.copyfile(shard, target)
    else:
        _link(shard, target)


def _save_model(family: Family, folder: Path) -> None:
    """Write all weights but the projector's, in the shards that `transformers` makes."""
    weights = {}
    for name, tensor in family.model.state_dict().items():
        # The projector gets a shard of its own, in float32.
        if not name.startswith(family.projector_names):
            weights[name] = tensor
    family.model.save_pretrained(folder, state_dict=weights)

    # Readers look for a single file first, and would then never open the projector's shard.
    if (folder / SINGLE).is_file():
        (folder / SINGLE).rename(folder / ONLY_SHARD)


def _write_index(folder: Path) -> None:
    """Write the index of all shards, and check that each tensor is in only one of them."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for shard in folder.glob("*.safetensors"):
        total_size += shard.stat().st_size
        for name in _tensor_names(shard):
            assert name not in weight_map, f"two shards hold {name}"
            weight_map[name] = shard.name

    index = {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _with_first(reducers: Mapping[int, Reducer], budget: int | None) -> list[Reducer]:
    """Put the reducer of a budget first. Raises UserError if the run was not tuned for it."""
    check_tuned_budget(budget, reducers)
    if budget is None:
        return list(reducers.values())

    others = [reducer for other, reducer in reducers.items() if other != budget]
    return [reducers[budget], *others]


def _export_meta(comparison: Comparison, family: Family, reducers: Sequence[Reducer]) -> dict[str, Any]:
    """Make the entries of the run's meta.json for an export, which is its own base model."""
    # The fingerprint is taken again, because merged LoRA has changed the weights.
    own = projector_meta(
        family,
        *reducers,
        base=base_name(comparison.meta["base"]["id"]),
        base_fingerprint=fingerprint(family),
        aspect_ratio=image_aspect_ratio(comparison.processor),
    )
    own |= {"adapter": False, "num_image_tokens": family.num_image_tokens(reducers[0])}
    return comparison.meta | own


def write_hf(
    run: Path,
    folder: Path,
    *,
    base: str | None = None,
    budget: int | None = None,
    copy: bool = False,
) -> None:
    """Write the complete model in the layout of `transformers`.

    `vzip.load` reduces it, `from_pretrained` keeps all tokens, and its processor counts all tokens.
    LoRA is merged into the weights, in the precision of the frozen weights. All weights are written
    anew in that case, and if the base is not in safetensors of `transformers`.

    Args:
        run: the folder of a finished run.
        folder: an empty folder.
        base: where the run's base model is now, if it has moved.
        budget: the default of `vzip.load`, one that the projector was tuned for.
        copy: copy the base's shards where they would be linked.
    """
    # A wrong budget is refused first: merging uses up the comparison.
    comparison, base = _open(run, base)
    reducers = _with_first(comparison.reducers, budget)
    has_lora = comparison.adapter is not None
    family = _merge(comparison)

    # Merged LoRA changes the base's weights, so its shards can't be used.
    shards = [] if has_lora else _base_shards(base, type(family))
    for shard in shards:
        _add_shard(shard, folder, family.projector_names, copy=copy)
    if not shards:
        _save_model(family, folder)
    save_file(_projector_copies(family), folder / WEIGHTS, metadata={"format": "pt"})

    # The index comes after all shards, because it lists what they hold.
    _write_index(folder)

    comparison.processor.save_pretrained(folder)
    family.model.generation_config.save_pretrained(folder)

    meta = _export_meta(comparison, family, reducers)
    meta |= {"merged_adapter": has_lora, "sha256": {WEIGHTS: sha256_of(folder / WEIGHTS)}}
    setattr(family.model.config, EXPORT, meta)

    # vLLM takes the first architecture that it knows, and asks the plugin for it. transformers does
    # not look at them.
    family.model.config.architectures = [ARCHITECTURE, type(family.model).__name__]
    family.model.config.save_pretrained(folder)


# LLaVA's own code


def llava_tensors(family: Family) -> dict[str, Tensor]:
    """Copy the projector under LLaVA's names, `model.mm_projector.{0,2}.{weight,bias}`.

    LLaVA-NeXT, LLaVA-OneVision, Video-LLaVA and Mini-Gemini have the same names. Source: repository
    haotian-liu/LLaVA, `llava/model/multimodal_projector/builder.py` and
    `llava/train/llava_trainer.py`.

    Raises:
        UserError: the projector is not LLaVA's `mlp2x_gelu`.
    """
    # Other projectors have other layers, or another activation between them.
    tensors = _projector_copies(family)
    names = {f"{family.projector_name}.{ours}": theirs for ours, theirs in _LLAVA_NAMES.items()}
    activation = getattr(family.model.config, "projector_hidden_act", None)
    if tensors.keys() != names.keys() or activation != "gelu":
        raise UserError(
            f"TO=llava: this projector ({activation}, {', '.join(sorted(tensors))}) is not LLaVA's "
            "mlp2x_gelu, which has two linear layers with biases and a GELU between; choose TO=hf"
        )
    return {f"model.{MM_PROJECTOR}.{names[name]}": value for name, value in tensors.items()}


def _llava_loader_config(family: Family, processor: Any, base: str) -> dict[str, Any] | None:
    """The config.json that LLaVA's loader needs beside the projector; None if none can be made."""
    config = read_config(base)
    if family.original is not None and family.original.is_original(config):
        # The run may have padded pictures where the base does not, or the other way round.
        return config | {"image_aspect_ratio": image_aspect_ratio(processor)}
    return family.original_config(processor)


def write_llava(run: Path, folder: Path, *, base: str | None = None) -> None:
    """Write `mm_projector.bin` for LLaVA's own code, and the same as safetensors.

    The loader's `config.json` is added if one can be made. The tensors are float32; LLaVA's loader
    casts them.

    Args:
        run: the folder of a finished run.
        folder: an empty folder.
        base: where the run's base model is now, if it has moved.

    Raises:
        UserError: the run has LoRA in the language model, for which the file has no room, or its
            projector is not LLaVA's.
    """
    comparison, base = _open(run, base)
    if _has_language_lora(comparison):
        raise UserError(
            f"TO=llava: {run} tuned LoRA in the language model, and mm_projector.bin holds a "
            "projector alone; choose TO=hf or TO=peft"
        )

    family = _merge(comparison)
    tensors = llava_tensors(family)
    torch.save(tensors, folder / f"{MM_PROJECTOR}.bin")
    save_file(tensors, folder / f"{MM_PROJECTOR}.safetensors", metadata={"format": "pt"})

    # LLaVA's loader takes the model's settings from this folder, and the weights from the base.
    config = _llava_loader_config(family, comparison.processor, base)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


# peft


def _has_language_lora(comparison: Comparison) -> bool:
    """Whether LoRA is in the language model, and not only in the projector."""
    if comparison.adapter is None:
        return False

    prefixes = comparison.family.projector_names
    return not all(name.startswith(prefixes) for name in comparison.meta["trained"])


def write_peft(run: Path, folder: Path, *, base: str | None = None) -> None:
    """Write an adapter for `PeftModel.from_pretrained(base model, folder)`.

    It has the projector as a complete module, and the LoRA of the language model if there is one.
    LoRA of the projector is merged into the projector. peft casts the projector to the precision of
    the base model. Attach the reducer afterwards.

    Args:
        run: the folder of a finished run.
        folder: an empty folder.
        base: where the run's base model is now, if it has moved.
    """
    check_package("peft", extra="train", purpose="TO=peft")
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    comparison, base = _open(run, base)
    # peft loads LoRA of the language model unchanged. It saves the projector as a complete module,
    # which can't have LoRA inside, so LoRA of the projector is merged.
    if _has_language_lora(comparison):
        comparison.attach("tuned").detach()
        family = comparison.family
        config = comparison.adapter.peft_config["default"]
        tensors = load_file(run / ADAPTER / ADAPTER_WEIGHTS)
    else:
        family = _merge(comparison)
        # peft's name for an adapter without any LoRA.
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES)
        tensors = {}

    # `modules_to_save` makes peft replace the base's projector by the complete one in the file.
    modules = {id(module) for module in family.projector_modules}
    config.modules_to_save = [name for name, module in family.model.named_modules() if id(module) in modules]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(folder)

    # peft finds tensors by their names in its own model, which wraps the base model.
    for name, tensor in _projector_copies(family).items():
        tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
