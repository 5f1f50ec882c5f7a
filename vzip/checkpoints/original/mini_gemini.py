"""Public checkpoints of Mini-Gemini, as they are: no conversion step.

A folder or hub id such as `YanweiLi/MGM-7B` is laid out as LLaVA's own code does (`vzip.checkpoints.original.llava`), with a second
tower (`mm_vision_tower_aux`, `image_size_aux`) and the three projections of mining (`vlm_uni_*`). Towers that the checkpoint
does not hold are taken from where config.json says, or from the hub. Source of the names: repository dvlab-research/MGM,
`mgm/model/mgm_arch.py` and `mgm/model/multimodal_encoder/openclip_encoder.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import ConvNextConfig, LlavaProcessor

from vzip.checkpoints.original.llava import load_tokenizer
from vzip.checkpoints.original.renaming import (
    DERIVED,
    LANGUAGE,
    PROJECTOR,
    TOWER,
    check_settings,
    few,
    fill,
    language_weights,
    projector_weights,
    text_config,
    tower_weights,
    vocab_size,
)
from vzip.checkpoints.original.towers import clip_weights, find_clip, tower_locations
from vzip.checkpoints.shards import read_config, read_tensors, read_weights
from vzip.errors import UserError
from vzip.models.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration, make_processor
from vzip.templates.encode import vicuna
from vzip.templates.jinja import chat_template

HUB_TOWERS = {
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
}
"""Where the towers of the public checkpoints are: their configs name folders that MGM's README has the user make."""
_SETTINGS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("mgm", "mini_gemini")),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "image_grid": (1, (1,)),
    "image_global": (False, (False,)),
    "image_aspect_ratio": (None, ("pad", "square", None)),
    "mm_use_im_start_end": (False, (False,)),
}
"""Setting: what MGM's code takes where it is absent, and the values that can be had here."""
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_UNUSED = re.compile(r"(?!visual\.).+|visual\.(?:trunk\.(?:norm_pre|head)|head)\..+")
"""The text tower and the pooling head, which Mini-Gemini has no use for."""
_HIGH = re.compile(r"(?:model\.vision_tower_aux\.vision_|visual\.trunk\.)((?:stem|stages)\..+)")
_MINING = re.compile(r"model\.vlm_uni_(query|aux|val)_projector\.(.+)")
_MINING_NAMES = {"query": "query", "aux": "key", "val": "value"}
_CONVNEXT = {
    "stem.0.": "embeddings.patch_embeddings.",
    "stem.1.": "embeddings.layernorm.",
    ".downsample.": ".downsampling_layer.",
    ".blocks.": ".layers.",
    ".conv_dw.": ".dwconv.",
    ".norm.": ".layernorm.",
    ".mlp.fc1.": ".pwconv1.",
    ".mlp.fc2.": ".pwconv2.",
    ".gamma": ".layer_scale_parameter",
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in the layout of MGM's code. Its `model_type` may be "mini_gemini", as ours is."""
    return config.get("mm_vision_tower_aux") is not None


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    """Raises UserError, before any work, for a setting that the model built here would not have."""
    check_settings(path, config, _SETTINGS)
    for key, kind in (("mm_vision_tower", str), ("mm_vision_tower_aux", str), ("image_size_aux", int)):
        if not isinstance(config.get(key), kind):
            raise UserError(
                f"{path}, config.json: {key} is {config.get(key)!r}; it must be there, of the type {kind.__name__}"
            )
    if "xxlarge" in (name := config["mm_vision_tower_aux"]).lower():
        raise UserError(
            f"{path}, config.json: mm_vision_tower_aux {name!r} is a convnext_xxlarge, whose LayerNorms have another epsilon "
            "than the others'; give a checkpoint with convnext_large_d_320"
        )


def _open_clip_weights(path: str, name: str) -> dict[str, Tensor]:
    """Tensors of the visual trunk in OpenCLIP's file: of the folder `mm_vision_tower_aux`, beside the checkpoint, on the hub.

    Raises UserError where there is no such file, and for tensors in it that are of no known use.
    """
    files = [
        place / file
        for place in tower_locations(path, name)
        for file in _OPEN_CLIP
        if (place / file).is_file()
    ]
    hub = HUB_TOWERS.get(Path(name).name, name)
    try:
        file = files[0] if files else Path(hf_hub_download(hub, _OPEN_CLIP[-1]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}, config.json: mm_vision_tower_aux {name!r} is no folder with {' or '.join(_OPEN_CLIP)}, here or beside"
            f" the checkpoint, and {hub} can't be had from the hub; put the tower's folder beside the checkpoint's: {error}"
        ) from error
    tensors = {
        key: tensor for key, tensor in read_tensors(file).items() if not _OPEN_CLIP_UNUSED.fullmatch(key)
    }
    if surplus := [key for key in tensors if not _HIGH.fullmatch(key)]:
        raise UserError(f"{file}: not part of a ConvNeXt of OpenCLIP are {few(surplus)}; give such a tower")
    return tensors


def convnext_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `timm`'s ConvNeXt (`stem.*`, `stages.*`) under the names in `HighResolutionTower`; others are left out.

    Both of MGM's prefixes are known: `model.vision_tower_aux.vision_` and, in OpenCLIP's own file, `visual.trunk.`.
    """
    named = {}
    for key, tensor in weights.items():
        if match := _HIGH.fullmatch(key):
            name = match[1]
            for old, new in _CONVNEXT.items():
                name = name.replace(old, new)
            named[name] = tensor
    return named


def _convnext_config(path: str, tensors: Mapping[str, Tensor], image_size: int) -> Any:
    """ConvNextConfig of tensors under the names in `HighResolutionTower`. Raises UserError for less than four stages."""
    widths, depths = [], []
    for stage in range(4):
        form = re.compile(rf"stages\.{stage}\.layers\.(\d+)\.dwconv\.weight")
        found = {int(match[1]): tensor for name, tensor in tensors.items() if (match := form.fullmatch(name))}
        if not found:
            raise UserError(
                f"{path}: the high-resolution tower lacks stages.{stage}.blocks.*.conv_dw.weight; get the whole of it"
            )
        widths.append(found[max(found)].shape[0])
        depths.append(max(found) + 1)
    return ConvNextConfig(hidden_sizes=widths, depths=depths, image_size=image_size)


def _config(config: Mapping[str, Any], vision: Any, high: Any) -> MiniGeminiConfig:
    text = text_config(config)
    return MiniGeminiConfig(
        vision_config=vision,
        text_config=text,
        high_resolution_config=high,
        image_token_index=vocab_size(config),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _tower_id(path: str, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the checkpoint but the high-resolution tower's, under the model's names; unknown ones under their own."""
    tensors = language_weights(weights, config) | projector_weights(weights, path)
    tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in tower_weights(weights).items()}
    forms = (LANGUAGE, PROJECTOR, TOWER, _HIGH, _MINING)
    for name, tensor in weights.items():
        if match := _MINING.fullmatch(name):
            tensors[f"model.mining.{_MINING_NAMES[match[1]]}.{match[2]}"] = tensor
        elif not name.endswith(DERIVED) and not any(form.fullmatch(name) for form in forms):
            tensors[name] = tensor  # refused by name further on
    return tensors


def load_model(path: str, *, dtype: torch.dtype) -> MiniGeminiForConditionalGeneration:
    """The checkpoint of a folder or hub id, on the CPU, in eval mode.

    Raises:
        OSError: no such folder or hub id.
        UserError: one of the "HD" models or another architecture, a tower that can't be found, files that are missing or
            broken, or weights that are not exactly the model's.
    """
    config = read_config(path)
    _check_config(path, config)
    tower, vision = find_clip(path, config["mm_vision_tower"], HUB_TOWERS)
    weights = read_weights(path)
    held = any(_HIGH.fullmatch(name) for name in weights)
    high = convnext_weights(weights if held else _open_clip_weights(path, config["mm_vision_tower_aux"]))
    model_config = _config(config, vision, _convnext_config(path, high, config["image_size_aux"]))
    tensors = _tower_id(path, weights, config)
    tensors |= {f"model.high_resolution_tower.{name}": tensor for name, tensor in high.items()}
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors |= {
            f"model.vision_tower.{name}": tensor for name, tensor in clip_weights(path, tower, dtype).items()
        }
    model: MiniGeminiForConditionalGeneration = fill(
        path, MiniGeminiForConditionalGeneration, model_config, tensors, dtype=dtype
    )
    return model


def load_processor(path: str) -> LlavaProcessor:
    """The checkpoint's processor, see `vzip.models.mini_gemini.make_processor`, with the chat template of Vicuna.

    Raises:
        OSError: no such folder or hub id.
        UserError: as `load_family`, or a tokenizer that does not fit `vocab_size`.
    """
    config = read_config(path)
    _check_config(path, config)
    vision = find_clip(path, config["mm_vision_tower"], HUB_TOWERS)[1]
    model_config = _config(config, vision, ConvNextConfig(image_size=config["image_size_aux"]))
    tokenizer = load_tokenizer(path)
    processor = make_processor(model_config, tokenizer, pad=config.get("image_aspect_ratio") == "pad")
    processor.chat_template = chat_template(vicuna(), tokenizer)
    return processor
