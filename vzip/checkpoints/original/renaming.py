"""Settings and weights of LLaVA's own code, named as in `transformers`.

Source of the names: repository haotian-liu/LLaVA, `llava/model/llava_arch.py` and
`llava/model/multimodal_projector/builder.py`.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig

from vzip.checkpoints.shards import read_tensors
from vzip.errors import UserError

ROWS = 64
"""The vocabulary is grown to a multiple of this, as in the checkpoints of llava-hf."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
LANGUAGE = re.compile(r"(?:model\.(?:embed_tokens|layers|norm)|lm_head)\..+")
PROJECTOR = re.compile(r"(?:.+\.)?mm_projector\.(.+)")
TOWER = re.compile(r"(?:model\.)?vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")
DERIVED = (".inv_freq", ".position_ids")
"""Buffers that older versions of transformers saved; they follow from the config."""
_LAYERS = {
    f"{old}.{kind}": f"linear_{new}.{kind}" for old, new in ((0, 1), (2, 2)) for kind in ("weight", "bias")
}


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are: a 7B model has hundreds."""
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def vocab_size(config: Mapping[str, Any]) -> int:
    """Ids of the original vocabulary; the first new one is `<image>`."""
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: vocab_size is {size!r}; it must be the number of rows of {_EMBEDDING}")
    return size


def text_config(config: Mapping[str, Any]) -> Any:
    """LlamaConfig of the top-level keys, `vocab_size` grown to the next multiple of 64 that has room for `<image>`.

    Raises:
        UserError: no vocab_size, or a value that LlamaConfig refuses.
    """
    known = inspect.get_annotations(LlamaConfig).keys() | {"rope_theta", "rope_scaling"}
    settings = {key: value for key, value in config.items() if key in known}
    settings["vocab_size"] = (vocab_size(config) // ROWS + 1) * ROWS
    try:
        return LlamaConfig(**settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"config.json: {error}; it must hold the settings of a Llama") from error


def _grow(name: str, old: Tensor, config: Mapping[str, Any]) -> Tensor:
    """float[vocab_size, d] -> float[grown, d]; each new row is the mean of the old ones.

    The logit of a mean row is the mean of the logits, so no new id ever is the most likely one.
    """
    size, grown = vocab_size(config), text_config(config).vocab_size
    if old.dim() != 2 or old.shape[0] != size:
        raise UserError(
            f"{name} has the shape {tuple(old.shape)}, but vocab_size in config.json is {size}; they must agree"
        )
    mean = old.float().mean(0, keepdim=True).to(old.dtype)
    return torch.cat([old, mean.expand(grown - size, -1)])


def language_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The language model's tensors under the names of `LlavaForConditionalGeneration`, embedding and head grown.

    Raises:
        UserError: an embedding or head that has not `vocab_size` rows.
    """
    named = {}
    for name, tensor in weights.items():
        if not LANGUAGE.fullmatch(name) or name.endswith(DERIVED):
            continue
        value = _grow(name, tensor, config) if name in (_EMBEDDING, _HEAD) else tensor
        named[name if name == _HEAD else f"model.language_model.{name.removeprefix('model.')}"] = value
    if config.get("tie_word_embeddings") and _EMBEDDING in weights:
        named.setdefault(_HEAD, named["model.language_model.embed_tokens.weight"])
    return named


def projector_weights(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, Tensor]:
    """`model.multi_modal_projector.linear_{1,2}.*` from `mm_projector.{0,2}.*`, whatever stands before; the rest is left out.

    Args:
        weights: tensors under LLaVA's names.
        source: what they were read from, for the message.

    Raises:
        UserError: no projector, one of another type than `mlp2x_gelu`, or one that ZeRO-3 left empty.
    """
    found = {match[1]: tensor for name, tensor in weights.items() if (match := PROJECTOR.fullmatch(name))}
    if found.keys() != _LAYERS.keys():
        held = f"mm_projector.* has {sorted(found)}" if found else "there is no mm_projector.*"
        raise UserError(
            f"{source}: {held}; a projector of the type mlp2x_gelu, with {sorted(_LAYERS)}, is what can be loaded"
            " (not linear, nor another depth)"
        )
    if empty := sorted(name for name, tensor in found.items() if tensor.numel() == 0):
        raise UserError(
            f"{source}: mm_projector.* is of size 0 in {empty}; LLaVA#665: saved under ZeRO-3 without gathering;"
            " save it again from that run with zero_to_fp32.py, or train under ZeRO-2"
        )
    return {f"model.multi_modal_projector.{_LAYERS[name]}": tensor for name, tensor in found.items()}


def tower_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's tensors under the names in `CLIPVisionModel`; empty where the checkpoint holds none."""
    found = {match[1]: tensor for name, tensor in weights.items() if (match := TOWER.fullmatch(name))}
    return {name: tensor for name, tensor in found.items() if not f".{name}".endswith(DERIVED)}


def read_projector(path: Path) -> dict[str, Tensor]:
    """A starting projector: ours as it is, LLaVA's `mm_projector.bin` (or safetensors) renamed.

    Raises:
        UserError: a file that can't be read, or LLaVA's with another projector or more than a projector.
    """
    try:
        tensors = read_tensors(path)
    except UserError as error:
        raise UserError(f"projector {error}") from error
    if not any("mm_projector" in name for name in tensors):
        return tensors
    if others := sorted(name for name in tensors if not PROJECTOR.fullmatch(name)):
        raise UserError(
            f"projector {path} holds more than mm_projector.*: {few(others)}; give a file of the projector alone"
        )
    return projector_weights(tensors, f"projector {path}")


def check_settings(
    path: str, config: Mapping[str, Any], settings: Mapping[str, tuple[Any, tuple[Any, ...]]]
) -> None:
    """Raises UserError for a setting of config.json that is not among the values that can be had.

    `settings` has, for each, what the checkpoint's own code takes where it is absent, and those values.
    """
    for key, (absent, allowed) in settings.items():
        if (value := config.get(key, absent)) not in allowed:
            raise UserError(
                f"{path}, config.json: {key} is {value!r}, not one of {', '.join(map(repr, allowed))}; give such a checkpoint"
            )


def check_tensors(path: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the keys, unless the tensors are the model's, one by one."""
    wrong = []
    if missing := expected.keys() - tensors.keys():
        wrong.append(f"missing are {few(missing)}")
    if surplus := tensors.keys() - expected.keys():
        wrong.append(f"not part of the model are {few(surplus)}")
    shapes = {
        name: (tuple(tensors[name].shape), tuple(expected[name].shape))
        for name in expected.keys() & tensors.keys()
    }
    if other := [f"{name} {held}, not {wanted}" for name, (held, wanted) in shapes.items() if held != wanted]:
        wrong.append(f"of another shape are {few(other)}")
    if wrong:
        raise UserError(
            f"{path}: the weights do not fit config.json: {'; '.join(wrong)};"
            " get the whole checkpoint, with its own config.json and towers"
        )


def fill(path: str, model_class: Any, config: Any, tensors: dict[str, Tensor], *, dtype: torch.dtype) -> Any:
    """The model of these tensors, on the CPU, in eval mode. Raises UserError unless they are its own, one by one.

    Tensors may be views of files until here, so that one copy of the model is held, in `dtype`.
    """
    with torch.device("meta"):
        check_tensors(path, tensors, model_class(config).state_dict())
    for name in tensors:
        tensors[name] = tensors[name].to(
            dtype, copy=True
        )  # also where nothing is cast: the file may change or go
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()
