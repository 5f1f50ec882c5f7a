"""Vision towers that a checkpoint names, but does not hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from vzip.checkpoints import hf
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError


def tower_locations(path: str, name: str) -> list[Path]:
    """List the folders where the tower `name` of the checkpoint `path` may be, best first.

    The first is `name` itself, as LLaVA's code takes it. Then follow `name` and its last part, in
    the checkpoint's folder and beside it: `mm_vision_tower` is often a path on the machine that
    trained the model.
    """
    folder = Path(path)
    locations = [Path(name)]
    if folder.is_dir():
        for parent in (folder, folder.resolve().parent):
            locations += [parent / name, parent / Path(name).name]
    return locations


def find_clip(path: str, name: str, hub_ids: Mapping[str, str] | None = None) -> tuple[str, Any]:
    """Find the CLIP that config.json names as `mm_vision_tower`.

    Args:
        path: the checkpoint.
        name: the name of the tower.
        hub_ids: hub ids by the names that checkpoints have for them.

    Returns:
        The tower's folder or hub id, and its CLIPVisionConfig.

    Raises:
        UserError: the tower can't be found, or is not a CLIP.
    """
    # A folder on this machine comes first. Without one, the name is looked up on the hub.
    tower = (hub_ids or {}).get(Path(name).name, name)
    for folder in tower_locations(path, name):
        if (folder / "config.json").is_file():
            tower = str(folder)
            break

    try:
        model_type = read_config(tower).get("model_type")
    except OSError as error:
        raise UserError(
            f"{path}, config.json: mm_vision_tower {name!r} is not a folder, nor does it lie in the "
            f"checkpoint's folder or beside it, and {tower} can't be had from the hub; "
            f"put its folder beside the checkpoint's: {error}"
        ) from error

    # A complete CLIP has a text tower too. Its vision part is read from it.
    if model_type not in ("clip", "clip_vision_model"):
        raise UserError(
            f"{path}, config.json: mm_vision_tower {name!r} is of the type {model_type!r}; "
            "only a CLIP tower is supported"
        )
    return tower, CLIPVisionConfig.from_pretrained(tower, trust_remote_code=False)


def clip_weights(path: str, tower: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read a CLIP's tensors, named as in `LlavaForConditionalGeneration`.

    Args:
        path: the checkpoint that names the tower, for the message.
        tower: the tower's folder or hub id.
        dtype: the precision of the tensors.

    Raises:
        UserError: the weights are not complete.
    """
    # The message has to name the checkpoint: its user never asked for this tower.
    try:
        model = hf.load_hf_model(CLIPVisionModel, tower, dtype=dtype)
    except (OSError, UserError) as error:
        raise UserError(
            f"{path}, config.json: the weights of mm_vision_tower {tower} can't be loaded: {error}"
        ) from error

    return {f"model.vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}
