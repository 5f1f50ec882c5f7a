"""Models and processors in the layout of `transformers`: whole, or refused with the reason."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoProcessor

from vzip.checkpoints.original.renaming import few
from vzip.errors import UserError


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raises UserError for whatever a broken file raises in the block; OSError, where there is no file, as it is."""
    try:
        yield
    except (OSError, UserError):
        raise
    except pickle.UnpicklingError as error:  # whose own message proposes to load it anyway
        raise UserError(
            f"{path}: the weights can't be read: a file is broken, or holds more than tensors, which would run as code when "
            "loaded; get the whole checkpoint, best as safetensors"
        ) from error
    except Exception as error:  # a broken file raises whatever its parser does
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} can't be loaded: {reason}; get the whole checkpoint, with its own configs"
        ) from error


def load_hf_model(model_class: Any, path: str, *, dtype: torch.dtype) -> Any:
    """The model of a folder or hub id, on the CPU, in eval mode.

    Raises:
        OSError: there is neither, or no weights.
        UserError: files that are broken, or do not fit each other; or weights that are not there, of which `transformers` only
            warns, and leaves them random.
    """
    with _explained(path):
        model, info = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if missing := info["missing_keys"]:
        raise UserError(f"{path} lacks the weights {few(missing)}; get the whole checkpoint")
    return model.eval()


def load_hf_processor(path: str) -> Any:
    """Its processor. Raises OSError where there is none, and UserError for files that are broken."""
    with _explained(path):
        return AutoProcessor.from_pretrained(path)
