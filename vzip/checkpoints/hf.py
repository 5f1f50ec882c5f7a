"""Load models and processors in the layout of `transformers`, or say why they can't be loaded."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoProcessor

from vzip.checkpoints.original.renaming import list_names
from vzip.errors import UserError


@contextmanager
def _explained(path: str) -> Iterator[None]:
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
        # The parser of a broken file raises errors of any kind.
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} can't be loaded: {reason}; get the whole checkpoint, with its own configs"
        ) from error


def load_hf_model(model_class: Any, path: str, *, dtype: torch.dtype) -> Any:
    """Load the model of a folder or hub id, on the CPU, in eval mode.

    Raises:
        OSError: there is no such folder or hub id, or it has no weights.
        UserError: files are broken or do not fit each other, or weights are missing. `transformers`
            only warns about missing weights, and leaves them random.
    """
    # transformers reports missing weights only if it is asked to.
    with _explained(path):
        model, info = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True)

    # Tensors that the model does not have are no problem: they can't change an answer.
    missing = info["missing_keys"]
    if missing:
        raise UserError(f"{path} lacks the weights {list_names(missing)}; get the whole checkpoint")
    return model.eval()


def load_hf_processor(path: str) -> Any:
    """Load the processor of a folder or hub id.

    Raises:
        OSError: the folder or hub id has no processor.
        UserError: its files are broken.
    """
    with _explained(path):
        return AutoProcessor.from_pretrained(path)
