"""Read a folder or hub id: its config.json, and its weights as one dict of tensors.

Weights are safetensors or PyTorch's format. Nothing but tensors is ever unpickled. Where the format
allows it, tensors are views of their files: reading is free, and a model larger than the memory can
be cast one tensor at a time.
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
_FORMATS = {
    "model.safetensors": "model*.safetensors",
    "pytorch_model.bin": "pytorch_model*.bin",
}
"""The name of a file that is not sharded, and the pattern of shards; the preferred format first."""


def _read_file(file: Path) -> Any:
    """Read what a file of weights holds. Raises UserError if it can't be read."""
    try:
        if file.suffix not in _PICKLED:
            return load_file(file)

        # Files from before PyTorch 1.6 are not zip files, and can't be mapped into memory.
        mmap = zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # PyTorch's own message proposes to load the file anyway.
        raise UserError(
            f"{file} can't be read: it is broken, or holds more than tensors, and that would run as "
            "code when loaded; give a file of tensors alone, best as safetensors"
        ) from error
    except Exception as error:
        # A broken pickle may raise anything.
        raise UserError(
            f"{file} can't be read: {error}; give a complete file of tensors, best as safetensors"
        ) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of one file: PyTorch's format for `.bin`, `.pt` and `.pth`, else
    safetensors.

    Raises:
        UserError: there is no such file, it is broken, or it holds anything but tensors by name.
            Code in it is never executed.
    """
    # Training scripts also save nested dicts, lists and bare tensors, which are not weights.
    content = _read_file(file)
    items = content.items() if isinstance(content, dict) else [(None, content)]

    tensors = {}
    for name, value in items:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{file} can't be read: it does not hold tensors by name; "
                "give a state dict, best as safetensors"
            )
        # A saved tensor may be a parameter, which would ask for gradients.
        tensors[name] = value.detach()
    return tensors


def read_config(path: str) -> dict[str, Any]:
    """Read `config.json` of a folder or hub id. Raises OSError if it is missing."""
    # transformers returns an empty dict for a folder or hub id without the file.
    config: dict[str, Any] = PreTrainedConfig.get_config_dict(path)[0]
    if not config:
        raise OSError(f"{path} has no config.json")
    return config


def _download(path: str, pattern: str) -> Path:
    """Return the folder `path`, or download the pattern's files and the index of a hub id."""
    if Path(path).is_dir():
        return Path(path)

    # A path that can't be a hub id is a folder that is missing, which callers expect as OSError.
    try:
        return Path(snapshot_download(path, allow_patterns=[pattern, "*.index.json"]))
    except HFValidationError as error:
        raise OSError(f"{path} is neither a folder nor a hub id") from error


def _shards(index: Path) -> list[Path]:
    """List the files that an index of shards names. Raises UserError if one is missing."""
    # A broken download may be valid JSON of another form.
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of shards: {error!r}; get it again") from error

    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; get the whole checkpoint"
        )
    return [index.parent / name for name in names]


def read_weights(path: str) -> dict[str, Tensor]:
    """Read all tensors of a folder or hub id: safetensors if there are any, else PyTorch's format.

    Raises:
        OSError: there is no such folder or hub id.
        UserError: there are no weights, a shard is missing, or a file is broken.
    """
    # Hub ids often have both formats. Try one at a time, so that only one is downloaded.
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
        f"{path} has no weights: neither {' nor '.join(_FORMATS)}, in one file or in shards with an "
        "index. Merge a LoRA into its base first (LLaVA's scripts/merge_lora_weights.py); "
        "an mm_projector.bin alone is a starting projector, not a model"
    )
