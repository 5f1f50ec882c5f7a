"""Settings and weights of LLaVA's own code, under the names of `transformers`.

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

from vzip.checkpoints.shards import check_all_finite, read_tensors
from vzip.errors import UserError

VOCABULARY_MULTIPLE = 64
"""The vocabulary grows to a multiple of this, as in the checkpoints of llava-hf."""

LANGUAGE = re.compile(r"(?:model\.(?:embed_tokens|layers|norm)|lm_head)\..+")
PROJECTOR = re.compile(r"(?:.+\.)?mm_projector\.(.+)")
TOWER = re.compile(r"(?:model\.)?vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")
DERIVED = (".inv_freq", ".position_ids")
"""Buffers that older versions of transformers saved. They follow from the config."""

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_PROJECTOR_NAMES = {
    "0.weight": "linear_1.weight",
    "0.bias": "linear_1.bias",
    "2.weight": "linear_2.weight",
    "2.bias": "linear_2.bias",
}


def list_names(names: Iterable[str]) -> str:
    """List the first names, and how many more there are: a 7B model has hundreds."""
    names = sorted(names)
    text = ", ".join(names[:8])
    if len(names) > 8:
        text += f" and {len(names) - 8} more"
    return text


# The language model


def vocab_size(config: Mapping[str, Any]) -> int:
    """The size of the original vocabulary. It is also the id of `<image>`, the first new token.

    Raises:
        UserError: `vocab_size` is missing, or not a whole number of at least 1.
    """
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: vocab_size is {size!r}; it must be the number of rows of {_EMBEDDING}")
    return size


def text_config(config: Mapping[str, Any]) -> Any:
    """Make a LlamaConfig of the top-level keys.

    Its `vocab_size` is the next multiple of 64 that has room for `<image>`.

    Raises:
        UserError: there is no vocab_size, or LlamaConfig refuses a value.
    """
    # The file holds settings of other parts too, which LlamaConfig would keep as its own.
    known = inspect.get_annotations(LlamaConfig).keys() | {"rope_theta", "rope_scaling"}
    settings = {key: value for key, value in config.items() if key in known}
    settings["vocab_size"] = (vocab_size(config) // VOCABULARY_MULTIPLE + 1) * VOCABULARY_MULTIPLE
    try:
        return LlamaConfig(**settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"config.json: {error}; it must hold the settings of a Llama") from error


def _grow(name: str, old: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Add rows to float[vocab_size, d], each the mean of the old ones.

    The logit of a mean row is the mean of the logits, so a new id is never the most likely one. It
    takes part in the softmax, as in the checkpoints of llava-hf (docs/fidelity.md).
    """
    size = vocab_size(config)
    if old.dim() != 2 or old.shape[0] != size:
        raise UserError(
            f"{name} has the shape {tuple(old.shape)}, but vocab_size in config.json is {size}; "
            "they must agree"
        )

    # The mean is taken in float32, because half precision would round the sum.
    num_new = text_config(config).vocab_size - size
    mean = old.float().mean(0, keepdim=True).to(old.dtype)
    return torch.cat([old, mean.expand(num_new, -1)])


def language_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the language model's tensors as in `LlavaForConditionalGeneration`.

    The embedding and the head are grown.

    Raises:
        UserError: the embedding or the head does not have `vocab_size` rows.
    """
    renamed = {}
    for name, tensor in weights.items():
        if not LANGUAGE.fullmatch(name) or name.endswith(DERIVED):
            continue

        # Only these two have a vector for each token of the vocabulary.
        value = _grow(name, tensor, config) if name in (_EMBEDDING, _HEAD) else tensor
        if name == _HEAD:
            renamed[name] = value
        else:
            renamed[f"model.language_model.{name.removeprefix('model.')}"] = value

    # A tied head is not saved, but the check of the model's tensors expects it.
    if config.get("tie_word_embeddings") and _EMBEDDING in weights:
        renamed.setdefault(_HEAD, renamed["model.language_model.embed_tokens.weight"])
    return renamed


# The projector


def projector_weights(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, Tensor]:
    """Rename `mm_projector.{0,2}.*` to `model.multi_modal_projector.linear_{1,2}.*`.

    Any prefix is accepted, and other tensors are left out.

    Args:
        weights: tensors under LLaVA's names.
        source: what they were read from, for the message.

    Raises:
        UserError: there is no projector, its type is not `mlp2x_gelu`, or ZeRO-3 left it empty.
    """
    tensors = {}
    for name, tensor in weights.items():
        match = PROJECTOR.fullmatch(name)
        if match:
            tensors[match[1]] = tensor

    # Another type of projector has other layers, which our model could not hold.
    if tensors.keys() != _PROJECTOR_NAMES.keys():
        present = f"mm_projector.* has {sorted(tensors)}" if tensors else "there is no mm_projector.*"
        raise UserError(
            f"{source}: {present}; only a projector of the type mlp2x_gelu, with "
            f"{sorted(_PROJECTOR_NAMES)}, can be loaded (not linear, nor another depth)"
        )

    # ZeRO-3 shards weights over the ranks. A save that does not gather them writes empty tensors.
    empty = sorted(name for name, tensor in tensors.items() if tensor.numel() == 0)
    if empty:
        raise UserError(
            f"{source}: mm_projector.* is of size 0 in {empty}; LLaVA#665: saved under ZeRO-3 "
            "without gathering; save it again from that run with zero_to_fp32.py, or train under "
            "ZeRO-2"
        )

    prefix = "model.multi_modal_projector."
    return {prefix + _PROJECTOR_NAMES[name]: tensor for name, tensor in tensors.items()}


def read_projector(path: Path) -> dict[str, Tensor]:
    """Read a starting projector, with the names of `transformers`.

    It may be one of ours, or LLaVA's `mm_projector.bin` (or the same as safetensors).

    Raises:
        UserError: the file can't be read; or it is LLaVA's, and holds another type of projector or
            more than a projector.
    """
    try:
        tensors = read_tensors(path)
    except UserError as error:
        raise UserError(f"projector {error}") from error

    # Our own file has the names of transformers already.
    is_llavas = any("mm_projector" in name for name in tensors)
    if not is_llavas:
        return tensors

    # More than a projector is probably a whole model, which has to be given as the base model.
    others = [name for name in tensors if not PROJECTOR.fullmatch(name)]
    if others:
        raise UserError(
            f"projector {path} holds more than mm_projector.*: {list_names(others)}; "
            "give a file of the projector alone"
        )
    return projector_weights(tensors, f"projector {path}")


# The vision tower


def tower_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the vision tower's tensors as in `LlavaForConditionalGeneration`.

    The result is empty if the checkpoint holds no tower.
    """
    # The prefix varies: newer versions of transformers save no ".vision_model." inside.
    renamed = {}
    for name, tensor in weights.items():
        match = TOWER.fullmatch(name)
        if match and not f".{match[1]}".endswith(DERIVED):
            renamed[f"model.vision_tower.{match[1]}"] = tensor
    return renamed


# Checks, and the model


def check_settings(
    path: str, config: Mapping[str, Any], settings: Mapping[str, tuple[Any, tuple[Any, ...]]]
) -> None:
    """Check the settings of a config.json.

    Args:
        path: the checkpoint, for the message.
        config: its config.json.
        settings: for each setting, the value that the checkpoint's own code assumes if it is
            absent, and the values that are supported.

    Raises:
        UserError: a value is not supported.
    """
    for key, (default, supported) in settings.items():
        value = config.get(key, default)
        if value not in supported:
            values = ", ".join(map(repr, supported))
            raise UserError(
                f"{path}, config.json: {key} is {value!r}, not one of {values}; "
                "give a checkpoint with one of these"
            )


def check_tensors(path: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that the tensors are exactly those of the model, with their shapes.

    Raises:
        UserError: some are missing, superfluous or of another shape; it names them.
    """
    # Collect all problems for one message, because they often have one common cause.
    problems = []
    missing = expected.keys() - tensors.keys()
    if missing:
        problems.append(f"missing are {list_names(missing)}")

    superfluous = tensors.keys() - expected.keys()
    if superfluous:
        problems.append(f"not part of the model are {list_names(superfluous)}")

    other_shapes = []
    for name in expected.keys() & tensors.keys():
        shape = tuple(tensors[name].shape)
        expected_shape = tuple(expected[name].shape)
        if shape != expected_shape:
            other_shapes.append(f"{name} {shape}, not {expected_shape}")
    if other_shapes:
        problems.append(f"of another shape are {list_names(other_shapes)}")

    if problems:
        raise UserError(
            f"{path}: the weights do not fit config.json: {'; '.join(problems)}; "
            "get the whole checkpoint, with its own config.json and towers"
        )


def build_model(
    path: str, model_class: Any, config: Any, tensors: dict[str, Tensor], *, dtype: torch.dtype
) -> Any:
    """Build the model of these tensors, on the CPU, in eval mode.

    The tensors may be views of files until here. They are cast in place, so that only one copy of
    the model is in memory.

    Raises:
        UserError: the tensors are not exactly those of the model.
    """
    # Check before anything is copied. On the meta device a model has shapes, but takes no memory.
    with torch.device("meta"):
        check_tensors(path, tensors, model_class(config).state_dict())

    # Copy even if nothing is cast: the files may change or go.
    for name in tensors:
        tensors[name] = tensors[name].to(dtype, copy=True)
    check_all_finite(tensors, source=path, advice="get the whole checkpoint")

    model = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, trust_remote_code=False
    )
    return model.eval()
