"""What a folder or hub id holds: config.json, and the weights as one dict of tensors, from safetensors or PyTorch's format.

Nothing but tensors is ever unpickled. Tensors are views of their files where the format allows it, so that reading is free and
a model larger than the memory can be cast one tensor at a time.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from vzip.errors import UserError

_PICKLED = {".bin", ".pt", ".pth"}
_FORMATS = {"model.safetensors": "model*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}
"""By preference: the file that is not sharded, and what its shards are called."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file: PyTorch's format for `.bin`, `.pt` and `.pth`, else safetensors.

    Raises:
        UserError: no such file, one that is broken, or one that holds anything but tensors by name; it is not executed.
    """
    try:
        if file.suffix in _PICKLED:
            # mmap is not for the format before PyTorch 1.6, which is not a zip
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        else:
            tensors = load_file(file)
    except pickle.UnpicklingError as error:
        # PyTorch's own message proposes to load it anyway
        raise UserError(
            f"{file} can't be read: it is broken, or holds more than tensors, and what it holds would run as code when loaded;"
            " give a file of tensors alone, best as safetensors"
        ) from error
    except Exception as error:  # a broken pickle may raise anything
        raise UserError(
            f"{file} can't be read: {error}; give a whole file of tensors, best as safetensors"
        ) from error
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            f"{file} can't be read: it does not hold tensors by name; give a state dict, best as safetensors"
        )
    return {name: value.detach() for name, value in tensors.items()}  # what was saved may be a parameter


def read_config(path: str) -> dict[str, Any]:
    """`config.json` of a folder or hub id. Raises OSError where there is none."""
    config: dict[str, Any] = PreTrainedConfig.get_config_dict(path)[0]
    if not config:
        raise OSError(f"{path} has no config.json")
    return config


def _download(path: str, pattern: str) -> Path:
    """The folder of a path or of the snapshot of a hub id, with the files of the pattern and the index of shards."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=[pattern, "*.index.json"]))
    except HFValidationError as error:
        raise OSError(f"{path} is neither a folder nor a hub id") from error


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of shards: {error!r}; get it again") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; get the whole checkpoint"
        )
    return [index.parent / name for name in names]


def read_weights(path: str) -> dict[str, Tensor]:
    """All tensors of a folder or hub id; safetensors if there are any, else PyTorch's format.

    Raises:
        OSError: no such folder or hub id.
        UserError: no weights, a shard that is missing, or a file that is broken.
    """
    for single, pattern in _FORMATS.items():
        folder = _download(path, pattern)
        if (folder / single).is_file():
            return read_tensors(folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            for shard in _shards(index):
                tensors |= read_tensors(shard)
            return tensors
    raise UserError(
        f"{path} has no weights: neither {' nor '.join(_FORMATS)}, whole or in shards with an index. Merge a LoRA into its base"
        " first (LLaVA's scripts/merge_lora_weights.py); an mm_projector.bin alone is a starting projector, not a model"
    )
