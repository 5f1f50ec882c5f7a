"""Prepare the processors of the tiny models, such as `model=next-tiny`.

They have the embedded default's tokenizer, and pictures of 112 pixels. Only processors are written:
each run makes random weights from the architecture in the model's config. `scripts.prepare.smol`
runs this.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from data.paths import ROOT
from scripts.prepare.folders import is_prepared, prepared_once

# Pictures of all tiny models, in pixels.
SIDE = 112
PATCH = 14

# Settings of the processors: square pictures, and a tower whose CLS token is left out.
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
WITH_CLS = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}

# An unused special token of SmolLM2's tokenizer, which becomes `<video>`.
VIDEO_TOKEN = "<jupyter_script>"

# Unused special tokens, and the tokens of Qwen-VL models around pictures that they become.
VISION_TOKENS = {
    "<file_sep>": "<|vision_start|>",
    "<filename>": "<|image_pad|>",
    "<gh_stars>": "<|vision_end|>",
    "<issue_start>": "<|video_pad|>",
}

# Unused special tokens, and the tokens of InternVL around pictures that they become.
TILE_TOKENS = {
    "<file_sep>": "<img>",
    "<filename>": "<IMG_CONTEXT>",
    "<gh_stars>": "</img>",
}


def rename_token(tokenizer: Any, old: str, new: str) -> Any:
    """Return the tokenizer with a special token under another name."""
    from transformers import AutoTokenizer

    # A tokenizer can't rename a token, so replace the name in its files.
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).glob("tokenizer*.json"):
            path.write_text(path.read_text().replace(old, new))
        return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)


def with_names(tokenizer: Any, names: dict[str, str]) -> Any:
    """Return the tokenizer with special tokens as attributes of these names."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, extra_special_tokens=names)


def _llava(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(CLIPImageProcessorPil(**SQUARE), tokenizer, **WITH_CLS)


def _llava_next(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    pinpoints = architecture["image_grid_pinpoints"]
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **SQUARE)
    return LlavaNextProcessor(images, tokenizer, **WITH_CLS)


def _llava_onevision(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor

    from vzip.media import build_processor

    images = LlavaOnevisionImageProcessorPil(
        image_grid_pinpoints=architecture["image_grid_pinpoints"],
        size={"height": SIDE, "width": SIDE},
    )
    settings = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
    return build_processor(LlavaOnevisionProcessor, images, tokenizer, settings)


def _video_llava(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor

    from vzip.media import build_processor

    return build_processor(VideoLlavaProcessor, VideoLlavaImageProcessor(**SQUARE), tokenizer, WITH_CLS)


def _mini_gemini(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from vzip.models import mini_gemini

    return mini_gemini.make_processor(mini_gemini.MiniGeminiConfig(**architecture), tokenizer)


def _qwen_vl(processor_class: Any, frame_processor: Any, tokenizer: Any) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    from vzip.media import build_processor

    # Every picture has 8 x 8 tokens, each made of 2 x 2 patches.
    num_pixels = (2 * SIDE) ** 2
    size = {"shortest_edge": num_pixels, "longest_edge": num_pixels}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)
    for old, new in VISION_TOKENS.items():
        tokenizer = rename_token(tokenizer, old, new)
    return build_processor(processor_class, images, tokenizer, {}, frame_processor=frame_processor)


def _qwen2_5_vl(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from vzip.families.qwen2_5_vl import Qwen25VL

    return _qwen_vl(Qwen25VL.processor_class, Qwen25VL.frame_processor, tokenizer)


def _qwen3_vl(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from vzip.families.qwen3_vl import Qwen3VL

    return _qwen_vl(Qwen3VL.processor_class, Qwen3VL.frame_processor, tokenizer)


def _internvl(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor

    from vzip.media import build_processor

    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True)
    for old, new in TILE_TOKENS.items():
        tokenizer = rename_token(tokenizer, old, new)

    # The processor asks its tokenizer for these tokens by name.
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    tokenizer = with_names(tokenizer, names | {"context_image_token": "<IMG_CONTEXT>"})
    settings = {"image_seq_length": (SIDE // PATCH) ** 2}
    return build_processor(InternVLProcessor, images, tokenizer, settings)


# Functions that build the processor of a tiny model from its architecture and a tokenizer, by the
# module of the model's family.
PROCESSORS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "video_llava": _video_llava,
    "mini_gemini": _mini_gemini,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}


def tiny_models() -> dict[str, dict[str, Any]]:
    """Return the architecture of each tiny model with its family, by the name of its config."""
    # The module of the family's class names it: vzip.families.llava_next.LlavaNext.
    models = {}
    for path in sorted((ROOT / "configs" / "model").glob("*-tiny.yaml")):
        model = yaml.safe_load(path.read_text())["model"]
        family = model["_target_"].rsplit(".", 2)[-2]
        models[path.stem] = model["architecture"] | {"model_type": family}
    return models


def prepare_tiny(tokenizer_folder: Path, target: Path) -> None:
    """Write a folder for each tiny model below `target`, unless they are there.

    Args:
        tokenizer_folder: the embedded default's model.
        target: the folder of all tiny models.
    """
    # Folders for other architectures are written again.
    models = tiny_models()
    if is_prepared(target, models):
        return

    with prepared_once(target, models) as new:
        if new is not None:
            _write_processors(tokenizer_folder, new, models)


def _write_processors(tokenizer_folder: Path, target: Path, models: dict[str, dict[str, Any]]) -> None:
    """Write a folder for each model, with the arguments of `prepare_tiny`."""
    # transformers takes seconds to import, so import it only when it is needed.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    tokenizer = rename_token(tokenizer, VIDEO_TOKEN, "<video>")
    for name, architecture in models.items():
        # `vzip` chooses the family by the model's type, so each folder has a config that names it.
        settings = dict(architecture)
        model_type = settings.pop("model_type")
        processor = PROCESSORS[model_type](settings, tokenizer)
        processor.save_pretrained(target / name)
        (target / name / "config.json").write_text(json.dumps({"model_type": model_type}))
