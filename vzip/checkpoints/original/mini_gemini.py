"""Public checkpoints of Mini-Gemini, loaded without a conversion step.

A folder or hub id such as `YanweiLi/MGM-7B` has the layout of LLaVA's own code
(`vzip.checkpoints.original.llava`), with a second tower (`mm_vision_tower_aux`, `image_size_aux`)
and the three projections of patch info mining (`vlm_uni_*`). Towers that the checkpoint does not
hold are read from where config.json says, or from the hub. Source of the names: repository
dvlab-research/MGM, `mgm/model/mgm_arch.py` and `mgm/model/multimodal_encoder/openclip_encoder.py`.
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
    build_model,
    check_settings,
    language_weights,
    list_names,
    projector_weights,
    text_config,
    tower_weights,
    vocab_size,
)
from vzip.checkpoints.original.towers import clip_weights, find_clip, tower_locations
from vzip.checkpoints.shards import read_config, read_tensors, read_weights
from vzip.errors import UserError
from vzip.models.mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    make_processor,
)
from vzip.templates.encode import vicuna
from vzip.templates.jinja import chat_template

_CLIP = "clip-vit-large-patch14-336"
_OPEN_CLIP = "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"
HUB_TOWERS = {
    _CLIP: "openai/clip-vit-large-patch14-336",
    _OPEN_CLIP: "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
}
"""Hub ids of the towers of the public checkpoints, by the folders that MGM's README tells to make.
"""

_SETTINGS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("mgm", "mini_gemini")),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "image_grid": (1, (1,)),
    "image_global": (False, (False,)),
    "image_aspect_ratio": (None, ("pad", "square", None)),
    "mm_use_im_start_end": (False, (False,)),
}
"""For each setting, the default of MGM's code, and the values that are supported here."""

_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPEN_CLIP_UNUSED = re.compile(r"(?!visual\.).+|visual\.(?:trunk\.(?:norm_pre|head)|head)\..+")
"""The text tower and the pooling head, which Mini-Gemini does not use."""

_CONVNEXT = re.compile(r"(?:model\.vision_tower_aux\.vision_|visual\.trunk\.)((?:stem|stages)\..+)")
_CONVNEXT_NAMES = {
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
"""Parts of `timm`'s names, and of ours."""

_MINING = re.compile(r"model\.vlm_uni_(query|aux|val)_projector\.(.+)")
_MINING_NAMES = {"query": "query", "aux": "key", "val": "value"}


# Config


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in the layout of MGM's code.

    Its `model_type` doesn't tell: it may be "mini_gemini", like ours.
    """
    return config.get("mm_vision_tower_aux") is not None


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that the model built here would not have."""
    check_settings(path, config, _SETTINGS)

    required = {"mm_vision_tower": str, "mm_vision_tower_aux": str, "image_size_aux": int}
    for key, kind in required.items():
        value = config.get(key)
        if not isinstance(value, kind):
            raise UserError(
                f"{path}, config.json: {key} is {value!r}; it must be given, as a {kind.__name__}"
            )

    name = config["mm_vision_tower_aux"]
    if "xxlarge" in name.lower():
        raise UserError(
            f"{path}, config.json: mm_vision_tower_aux {name!r} is a convnext_xxlarge, whose "
            "LayerNorms have another epsilon than the others'; give a checkpoint with "
            "convnext_large_d_320"
        )


def _convnext_config(path: str, tensors: Mapping[str, Tensor], image_size: int) -> Any:
    """Make the ConvNextConfig of tensors with our names. Raises UserError if a stage is missing."""
    # No file describes this tower, so count the layers of each stage, and measure their width.
    widths = []
    depths = []
    for stage in range(4):
        # The depthwise convolution is in every layer, once.
        pattern = re.compile(rf"stages\.{stage}\.layers\.(\d+)\.dwconv\.weight")
        layers = {}
        for name, tensor in tensors.items():
            match = pattern.fullmatch(name)
            if match:
                layers[int(match[1])] = tensor
        if not layers:
            raise UserError(
                f"{path}: the high-resolution tower lacks stages.{stage}.blocks.*.conv_dw.weight; "
                "get the complete tower"
            )

        # All layers of a stage have the same width.
        last = max(layers)
        widths.append(layers[last].shape[0])
        depths.append(last + 1)
    return ConvNextConfig(hidden_sizes=widths, depths=depths, image_size=image_size)


def _mini_gemini_config(config: Mapping[str, Any], vision: Any, high: Any) -> MiniGeminiConfig:
    """Make the config of the model from a checked config.json and the configs of both towers."""
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


# Weights


def _find_open_clip(path: str, name: str) -> Path:
    """Find the file of OpenCLIP's tower: where `mm_vision_tower_aux` says, or on the hub.

    Raises:
        UserError: it is in neither place.
    """
    # In each folder safetensors come first: they load faster, and can't hold code.
    for folder in tower_locations(path, name):
        for file in _OPEN_CLIP_FILES:
            if (folder / file).is_file():
                return folder / file

    # No folder has it, so download it. The public repository has PyTorch's format alone.
    hub_id = HUB_TOWERS.get(Path(name).name, name)
    try:
        return Path(hf_hub_download(hub_id, _OPEN_CLIP_FILES[-1]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}, config.json: mm_vision_tower_aux {name!r} is not a folder with "
            f"{' or '.join(_OPEN_CLIP_FILES)}, here or beside the checkpoint, and {hub_id} can't be "
            f"had from the hub; put the tower's folder beside the checkpoint's: {error}"
        ) from error


def _open_clip_weights(file: Path) -> dict[str, Tensor]:
    """Read the visual trunk in OpenCLIP's file. Raises UserError for tensors of an unknown use."""
    tensors = {}
    for name, tensor in read_tensors(file).items():
        if not _OPEN_CLIP_UNUSED.fullmatch(name):
            tensors[name] = tensor

    # A tensor that nobody reads would mean that this is another architecture.
    unknown = [name for name in tensors if not _CONVNEXT.fullmatch(name)]
    if unknown:
        raise UserError(
            f"{file}: not part of a ConvNeXt of OpenCLIP are {list_names(unknown)}; give such a tower"
        )
    return tensors


def convnext_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of `timm`'s ConvNeXt as in `HighResolutionTower`; others are left out.

    The names start with MGM's prefix, `model.vision_tower_aux.vision_`, or with that of OpenCLIP's
    own file, `visual.trunk.`.
    """
    renamed = {}
    for key, tensor in weights.items():
        match = _CONVNEXT.fullmatch(key)
        if match:
            # A name has several of these parts, e.g. ".blocks." and ".conv_dw.".
            name = match[1]
            for theirs, ours in _CONVNEXT_NAMES.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    return renamed


def _other_weights(path: str, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename all tensors as in the model, except those of the high-resolution tower."""
    tensors = language_weights(weights, config)
    tensors |= projector_weights(weights, path)
    tensors |= tower_weights(weights)

    for name, tensor in weights.items():
        match = _MINING.fullmatch(name)
        if match:
            tensors[f"model.mining.{_MINING_NAMES[match[1]]}.{match[2]}"] = tensor
            continue

        # Unknown tensors keep their names, under which `build_model` refuses them.
        known = (LANGUAGE, PROJECTOR, TOWER, _CONVNEXT)
        is_known = any(pattern.fullmatch(name) for pattern in known)
        if not is_known and not name.endswith(DERIVED):
            tensors[name] = tensor
    return tensors


# Model and processor


def load_model(path: str, *, dtype: torch.dtype) -> MiniGeminiForConditionalGeneration:
    """Load a checkpoint, on the CPU, in eval mode.

    Args:
        path: a folder or hub id.
        dtype: the precision of the weights.

    Raises:
        OSError: there is no such folder or hub id.
        UserError: it is one of the "HD" models or another architecture, a tower can't be found,
            files are missing or broken, or the weights are not exactly the model's.
    """
    # Settings and the first tower are checked before the weights, which take long to read.
    config = read_config(path)
    _check_config(path, config)
    tower, vision = find_clip(path, config["mm_vision_tower"], HUB_TOWERS)
    weights = read_weights(path)

    # The checkpoint holds both towers, or neither.
    high = convnext_weights(weights)
    if not high:
        file = _find_open_clip(path, config["mm_vision_tower_aux"])
        high = convnext_weights(_open_clip_weights(file))

    tensors = _other_weights(path, weights, config)
    tensors |= {f"model.high_resolution_tower.{name}": tensor for name, tensor in high.items()}
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors |= clip_weights(path, tower, dtype)

    # config.json does not describe this tower, but its tensors do.
    high_config = _convnext_config(path, high, config["image_size_aux"])
    model_config = _mini_gemini_config(config, vision, high_config)
    model: MiniGeminiForConditionalGeneration = build_model(
        path, MiniGeminiForConditionalGeneration, model_config, tensors, dtype=dtype
    )
    return model


def load_processor(path: str) -> LlavaProcessor:
    """Load the checkpoint's processor, with the chat template of Vicuna.

    Raises:
        OSError: there is no such folder or hub id.
        UserError: a setting is not supported, or the tokenizer does not fit `vocab_size`.
    """
    config = read_config(path)
    _check_config(path, config)
    _, vision = find_clip(path, config["mm_vision_tower"], HUB_TOWERS)

    # The processor needs only the size of the pictures, so no weights are read for this config.
    high = ConvNextConfig(image_size=config["image_size_aux"])

    tokenizer = load_tokenizer(path)
    pads = config.get("image_aspect_ratio") == "pad"
    processor = make_processor(_mini_gemini_config(config, vision, high), tokenizer, pad=pads)
    processor.chat_template = chat_template(vicuna(), tokenizer)
    return processor
