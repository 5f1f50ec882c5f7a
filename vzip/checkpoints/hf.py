"""Load models and processors in the layout of `transformers`, or say why they can't be loaded.

Code in the folder of a model is never run, and `transformers` is told so in every call. Otherwise
it would ask at the terminal whether it may.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from vzip.checkpoints.original.renaming import list_names
from vzip.checkpoints.shards import check_all_finite, is_file_name, list_shards
from vzip.errors import UserError
from vzip.files import read_json_object
from vzip.media import FrameProcessor, build_processor

_WHOLE = "get the whole checkpoint, with its own configs"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def needs_own_code(error: Exception) -> bool:
    """Whether `transformers` refused to run the code in a model's folder."""
    return "trust_remote_code" in str(error)


def own_code_error(path: str) -> UserError:
    """Make the error about a model that comes with code."""
    return UserError(
        f"{path} comes with code of its own, which is never run here; models that need their own code "
        "are not supported: give one whose classes are part of transformers"
    )


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Raise UserError for whatever a broken file raises in the block. OSError passes unchanged."""
    try:
        yield
    except (OSError, UserError):
        raise
    except pickle.UnpicklingError as error:
        # The error's own message proposes to load the file anyway.
        raise UserError(
            f"{path}: the weights can't be read: a file is broken, or holds more than tensors, "
            "which would run as code when loaded; get the whole checkpoint, best as safetensors"
        ) from error
    except Exception as error:
        # The parser of a broken file raises errors of any kind. One of them proposes a setting that
        # does not exist here.
        reason = str(error) or type(error).__name__
        if needs_own_code(error):
            raise own_code_error(path) from error
        raise UserError(f"{path} can't be loaded: {reason}; {_WHOLE}") from error


def _check_files(path: str) -> None:
    """Raise UserError if a folder's files name files outside of it."""
    # transformers would open the path of a shard or of a tokenizer wherever it leads.
    folder = Path(path)
    for name in _INDICES:
        if (folder / name).is_file():
            list_shards(folder / name)

    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        names = read_json_object(tokenizer, advice=_WHOLE).get("fast_tokenizer_files") or []
        if not isinstance(names, list) or not all(is_file_name(name) for name in names):
            raise UserError(f"{tokenizer}: fast_tokenizer_files are not files in its folder; {_WHOLE}")


def load_hf_model(model_class: Any, path: str, *, dtype: torch.dtype) -> Any:
    """Load the model of a folder or hub id, on the CPU, in eval mode.

    Raises:
        OSError: there is no such folder or hub id, or it has no weights.
        UserError: files are broken or do not fit each other, or weights are missing or not finite.
            `transformers` only warns about missing weights, and leaves them random.
    """
    # transformers reports missing weights only if it is asked to.
    _check_files(path)
    with explained(path):
        model, info = model_class.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )

    # Tensors that the model does not have are no problem: they can't change an answer.
    missing = info["missing_keys"]
    if missing:
        raise UserError(f"{path} lacks the weights {list_names(missing)}; get the whole checkpoint")
    check_all_finite(dict(model.named_parameters()), source=path, advice="get the whole checkpoint")
    return model.eval()


def load_hf_processor(path: str) -> Any:
    """Load the processor of a folder or hub id.

    Raises:
        OSError: the folder or hub id has no processor.
        UserError: its files are broken, or it needs code of its own.
    """
    _check_files(path)
    with explained(path):
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)


def load_video_processor(
    processor_class: Any, path: str, *, frame_processor: type[FrameProcessor] = FrameProcessor
) -> Any:
    """Load the processor of a model that takes videos, with or without torchvision.

    `frame_processor` prepares videos without it. Raises the same errors as `load_hf_processor`.
    """
    if is_torchvision_available():
        return load_hf_processor(path)

    # The parts are loaded one by one; the rest of the file is settings of the processor.
    _check_files(path)
    with explained(path):
        settings, _ = processor_class.get_processor_dict(path)
        parts = {"processor_class", *processor_class.get_attributes()}
        own_settings = {name: value for name, value in settings.items() if name not in parts}
        return build_processor(
            processor_class,
            AutoImageProcessor.from_pretrained(path, trust_remote_code=False),
            AutoTokenizer.from_pretrained(path, trust_remote_code=False),
            own_settings,
            frame_processor=frame_processor,
        )
