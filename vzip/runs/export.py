"""A run's tuned model in the formats of others: of `transformers`, of LLaVA's own code, of peft.

Each `write_` takes a finished run, an empty folder, and where the run's base model is now, if not where the run found it. It
raises UserError for what is no such run, or a base model that is not its own.

`write_hf`: the whole model. The base's shards are linked where they hold no tensor of the projector; the tuned projector stands
in a shard of its own, in float32, as it was trained. `from_pretrained` casts it to the model's precision (bfloat16 keeps 8 of
its 24 bits), `vzip.load` does not. `config.json` says, under the key `vzip`, what `meta.json` of a run says.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vzip.checkpoints.shards import read_config
from vzip.runs.compare import Comparison, check_tuned_budget
from vzip.errors import UserError, check_package
from vzip.families import Family
from vzip.runs.projector import ADAPTER, CONFIG, EXPORT, WEIGHTS, projector_meta, fingerprint, is_export, read_finished
from vzip.reducers import Reducer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX, SINGLE, ONLY_SHARD = "model.safetensors.index.json", "model.safetensors", "model-00001-of-00001.safetensors"
MM_PROJECTOR = "mm_projector"


def projector_tensors(family: Family) -> dict[str, Tensor]:
    """The projector's tensors by their names in the model, each a copy of its own."""
    parameters = family.model.named_parameters()
    return {name: p.detach().clone().contiguous() for name, p in parameters if name.startswith(family.projector_name)}


def _open(run: Path, base: str | None) -> tuple[Comparison, str]:
    """(the run, opened on the CPU; folder or hub id of its base)."""
    if is_export(run):
        raise UserError(f"{run} is an export itself; give the folder of the run that it was made of")
    read_finished(run)
    opened = Comparison.open(run, base=base, device="cpu")
    return opened, base or opened.meta["base"]["id"]


def _with_first(reducers: Mapping[int, Reducer], budget: int | None) -> list[Reducer]:
    """The reducers with that of `budget` first. Raises UserError for one that is not there."""
    check_tuned_budget(budget, reducers)
    return sorted(reducers.values(), key=lambda reducer: budget is not None and reducer is not reducers[budget])


def base_name(base: str) -> str:
    """A hub id as it is; of a folder its last part, as where it is on this machine is nobody else's concern."""
    path = Path(base)
    return path.resolve().name if path.is_dir() or path.is_absolute() else base


# transformers


def _base_shards(base: str, cls: type[Family]) -> list[Path]:
    """The safetensors files of a base model in the format of `transformers`; none where it has another."""
    if cls.original is not None and cls.original.is_original(read_config(base)):
        return []
    folder = Path(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, allow_patterns=["model*.safetensors", INDEX]))
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    return []


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def _link(source: Path, target: Path) -> None:
    """A hard link, which outlives its source; a symbolic one where the disk is another."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.symlink_to(source.resolve())


def _take_shard(shard: Path, folder: Path, projector_name: str, *, copy: bool) -> None:
    """A base's shard, linked, or copied; written anew without the projector's tensors where it holds some."""
    target = folder / (ONLY_SHARD if shard.name == SINGLE else shard.name)
    names = _names(shard)
    # Files may have the names of before transformers 4.52, which lack the leading "model.".
    kept = [name for name in names if not f"model.{name.removeprefix('model.')}".startswith(projector_name)]
    if len(kept) < len(names):
        tensors = load_file(shard)
        save_file({name: tensors[name] for name in kept}, target, metadata={"format": "pt"})
    elif copy:
        shutil.copyfile(shard, target)
    else:
        _link(shard, target)


def _write_model(family: Family, folder: Path) -> None:
    """The model's own weights, all but the projector's, in the shards that `transformers` makes."""
    state = family.model.state_dict()
    family.model.save_pretrained(folder, state_dict={n: t for n, t in state.items() if not n.startswith(family.projector_name)})
    if (folder / SINGLE).is_file():
        (folder / SINGLE).rename(folder / ONLY_SHARD)


def _write_index(folder: Path) -> None:
    """The index of all shards. Each tensor is in one of them alone, so that no reader has to choose."""
    shards = sorted(folder.glob("*.safetensors"))
    places = [(name, shard.name) for shard in shards for name in _names(shard)]
    assert len(dict(places)) == len(places), "two shards hold the same tensor"
    size = sum(shard.stat().st_size for shard in shards)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_hf(run: Path, folder: Path, *, base: str | None = None, budget: int | None = None, copy: bool = False) -> None:
    """The whole model: reduced for `vzip.load`, with all tokens for `from_pretrained`; its processor counts all tokens.

    A run with LoRA has it merged into weights of its own, in the precision of the frozen weights. These are written too where
    the base is in another format than safetensors of `transformers`.

    Args:
        run: a finished run's folder.
        folder: an empty one.
        base: see above.
        budget: the one that `vzip.load` takes by default, of those that the projector was tuned for.
        copy: copy the base's shards where they would be linked.
    """
    opened, base = _open(run, base)
    reducers, merged = _with_first(opened.reducers, budget), opened.meta["adapter"]
    family = opened.tuned_family()
    described = projector_meta(family, *reducers, base=base_name(opened.meta["base"]["id"]), base_fingerprint=fingerprint(family))
    described |= {"adapter": False, "merged_adapter": merged, "num_image_tokens": family.num_image_tokens(reducers[0])}
    shards = [] if merged else _base_shards(base, type(family))
    for shard in shards:
        _take_shard(shard, folder, family.projector_name, copy=copy)
    if not shards:
        _write_model(family, folder)
    save_file(projector_tensors(family), folder / WEIGHTS, metadata={"format": "pt"})
    _write_index(folder)
    opened.processor.save_pretrained(folder)
    family.model.generation_config.save_pretrained(folder)
    setattr(family.model.config, EXPORT, opened.meta | described)
    family.model.config.save_pretrained(folder)


# LLaVA's own code


def llava_tensors(family: Family) -> dict[str, Tensor]:
    """The projector under the names of LLaVA's own code, `model.mm_projector.{0,2}.{weight,bias}`.

    Those of LLaVA-NeXT, LLaVA-OneVision, Video-LLaVA and Mini-Gemini are the same. Source: repository haotian-liu/LLaVA,
    `llava/model/multimodal_projector/builder.py` and `llava/train/llava_trainer.py`.

    Raises:
        UserError: a projector that is not LLaVA's `mlp2x_gelu`.
    """
    layers = {f"{family.projector_name}.linear_{ours}": f"model.{MM_PROJECTOR}.{theirs}" for ours, theirs in ((1, 0), (2, 2))}
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in layers.items() for kind in ("weight", "bias")}
    tensors, activation = projector_tensors(family), family.model.config.projector_hidden_act
    if tensors.keys() != names.keys() or activation != "gelu":
        raise UserError(
            f"TO=llava: this projector ({activation}, {', '.join(sorted(tensors))}) is not LLaVA's mlp2x_gelu, which has two "
            "linear layers with biases and a GELU between; choose TO=hf"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _original_config(family: Family, processor: Any, base: str) -> dict[str, Any] | None:
    """What LLaVA's loader wants beside the projector: the base's own, or one made; None where the tower has no known name."""
    config = read_config(base)
    if family.original is not None and family.original.is_original(config):
        return config
    return family.original_config(processor)


def write_llava(run: Path, folder: Path, *, base: str | None = None) -> None:
    """`mm_projector.bin` for LLaVA's own code, the same as safetensors, and, where it is known, its loader's `config.json`.

    The tensors are float32; LLaVA's loader casts them. Raises UserError also for LoRA in the language model, which there is no
    place for, and for a projector that is not LLaVA's.
    """
    opened, base = _open(run, base)
    if _has_language_lora(opened):
        raise UserError(
            f"TO=llava: {run} tuned LoRA in the language model, and mm_projector.bin holds a projector alone; choose TO=hf or "
            "TO=peft"
        )
    family = opened.tuned_family()
    tensors = llava_tensors(family)
    torch.save(tensors, folder / f"{MM_PROJECTOR}.bin")
    save_file(tensors, folder / f"{MM_PROJECTOR}.safetensors", metadata={"format": "pt"})
    if (config := _original_config(family, opened.processor, base)) is not None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


# peft


def _has_language_lora(opened: Comparison) -> bool:
    """Whether a run's LoRA is in the language model; the projector's own can be merged into it."""
    prefix = opened.family.projector_name
    return bool(opened.meta["adapter"]) and not all(name.startswith(prefix) for name in opened.meta["trained"])


def write_peft(run: Path, folder: Path, *, base: str | None = None) -> None:
    """An adapter for `PeftModel.from_pretrained(base model, folder)`: the projector as a module to save, whole, and the LoRA of
    the language model, where there is some; LoRA of the projector is merged into it.

    Attach the reducer behind it. peft casts the projector to the precision of the base model that it is put on.
    """
    check_package("peft", extra="train", purpose="TO=peft")
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    opened, base = _open(run, base)
    tensors: dict[str, Tensor] = {}
    if _has_language_lora(opened):
        opened.attach("tuned").detach()
        config, tensors = LoraConfig.from_pretrained(str(run / ADAPTER)), load_file(run / ADAPTER / ADAPTER_WEIGHTS)
        projector = projector_tensors(opened.family)
    else:
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES)  # no LoRA at all: peft's own word for it
        projector = projector_tensors(opened.tuned_family())
    config.modules_to_save, config.base_model_name_or_path = [opened.family.projector_name], base
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
