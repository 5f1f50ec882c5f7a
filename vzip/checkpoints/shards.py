"""Read a folder or hub id: its config.json, and its weights as one dict of tensors.

Weights are safetensors or PyTorch's format. Nothing but tensors is ever unpickled. Where the format
allows it, tensors are views of their files: reading is free, and a model larger than the memory can
be cast one tensor at a time.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from vzip.errors import UserError
from vzip.files import check_is_file, read_json_object

_PICKLED = {".bin", ".pt", ".pth"}
_FORMATS = {
    "model.safetensors": "model*.safetensors",
    "pytorch_model.bin": "pytorch_model*.bin",
}
"""The name of a file that is not sharded, and the pattern of shards; the preferred format first."""


def _read_file(file: Path) -> Any:
    """Read what a file of weights holds. Raises UserError if it can't be read."""
    try:
        check_is_file(file)
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


def check_all_finite(tensors: Mapping[str, Tensor], *, source: str, advice: str) -> None:
    """Check that no value is infinite or "not a number" (NaN).

    Args:
        tensors: the tensors by name.
        source: where they come from, for the message.
        advice: what the user can do, to end the message with.

    Raises:
        UserError: there is such a value; it names the tensor.
    """
    # The extremes show every such value, and cost no more than reading the memory once.
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
            continue
        low, high = torch.aminmax(tensor.detach())
        if not (low.isfinite() and high.isfinite()):
            raise UserError(f"{source}: {name} holds values that are not finite numbers; {advice}")


def read_config(path: str) -> dict[str, Any]:
    """Read `config.json` of a folder or hub id.

    Raises:
        OSError: it is missing, or no JSON.
        UserError: it holds no settings of a model.
    """
    # transformers returns an empty dict for a folder or hub id without the file.
    try:
        config = PreTrainedConfig.get_config_dict(path)[0]
    except OSError:
        raise
    except Exception as error:
        # A file with another content than an object raises errors of any kind.
        raise UserError(f"{path}: config.json is damaged ({error}); get it again") from error
    if not config:
        raise OSError(f"{path} has no config.json")

    model_type = config.get("model_type")
    if not isinstance(model_type, str | None):
        raise UserError(f"{path}: model_type in config.json is no text; get the file again")
    return dict(config)


def _download(path: str, pattern: str) -> Path:
    """Return the folder `path`, or download the pattern's files and the index of a hub id."""
    if Path(path).is_dir():
        return Path(path)

    # A path that can't be a hub id is a folder that is missing, which callers expect as OSError.
    try:
        return Path(snapshot_download(path, allow_patterns=[pattern, "*.index.json"]))
    except HFValidationError as error:
        raise OSError(f"{path} is neither a folder nor a hub id") from error


def is_file_name(name: Any) -> bool:
    """Whether a value is the name of a file, and no path that leads to another folder."""
    return isinstance(name, str) and name != ".." and Path(name).name == name


def list_shards(index: Path) -> list[Path]:
    """List the files that an index of shards names.

    Raises:
        UserError: the index is damaged, or names a file that is missing or in another folder.
    """
    advice = "this is not an index of shards: get it again"
    weight_map = read_json_object(index, advice=advice).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not weight_map or not is_map:
        raise UserError(f"{index} has no weight_map; {advice}")

    # Anybody may have written the index. It must not name files of this machine.
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_file_name(name):
            raise UserError(
                f"{index} names {name[:100]!r}, which is not a file in its folder; get the whole checkpoint"
            )

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
            for shard in list_shards(index):
                tensors |= read_tensors(shard)
            return tensors

    raise UserError(
        f"{path} has no weights: neither {' nor '.join(_FORMATS)}, in one file or in shards with an "
        "index. Merge a LoRA into its base first (LLaVA's scripts/merge_lora_weights.py); "
        "an mm_projector.bin alone is a starting projector, not a model"
    )
