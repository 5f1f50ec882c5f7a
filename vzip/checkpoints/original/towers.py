"""Vision towers that a checkpoint names and does not hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from vzip.checkpoints import hf as whole
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError


def tower_locations(path: str, name: str) -> list[Path]:
    """Folders where the tower `name` of the checkpoint `path` may be, best first.

    `name` itself is the first, as LLaVA's code takes it. Then `name`, and its last part, in the checkpoint's folder and beside
    it: `mm_vision_tower` is often a path on the machine that trained.
    """
    folder = Path(path)
    places = [Path(name)]
    if folder.is_dir():
        places += [
            base / part for base in (folder, folder.resolve().parent) for part in (name, Path(name).name)
        ]
    return places


def find_clip(path: str, name: str, hub_ids: Mapping[str, str] | None = None) -> tuple[str, Any]:
    """(folder or hub id, CLIPVisionConfig) of the CLIP that config.json names as `mm_vision_tower`.

    Args:
        path: of the checkpoint.
        name: of the tower.
        hub_ids: hub ids of towers that checkpoints name otherwise.

    Raises:
        UserError: there is none, or it is not a CLIP.
    """
    hub_id = (hub_ids or {}).get(Path(name).name, name)
    tower = next(
        (str(place) for place in tower_locations(path, name) if (place / "config.json").is_file()), hub_id
    )
    try:
        kind = read_config(tower).get("model_type")
    except OSError as error:
        raise UserError(
            f"{path}, config.json: mm_vision_tower {name!r} is neither a folder, nor lies in the checkpoint's folder or"
            f" beside it, and {tower} can't be had from the hub; put its folder beside the checkpoint's: {error}"
        ) from error
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(
            f"{path}, config.json: mm_vision_tower {name!r} is of the type {kind!r}; a CLIP tower is supported"
        )
    return tower, CLIPVisionConfig.from_pretrained(tower)


def clip_weights(path: str, tower: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a CLIP's folder or hub id, under the names in `CLIPVisionModel`. Raises UserError unless all are there."""
    try:
        model = whole.load_hf_model(CLIPVisionModel, tower, dtype=dtype)
    except (OSError, UserError) as error:
        raise UserError(
            f"{path}, config.json: the weights of mm_vision_tower {tower} can't be loaded: {error}"
        ) from error
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors
