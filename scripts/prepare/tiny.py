"""The processors of the tiny models (`model=next-tiny` and the like): the embedded default's tokenizer, pictures of 112 pixels.

Their weights are random, made at each start from the architecture in their config. `prepare_smol.py` runs this.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import (
    AutoTokenizer,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from data.paths import ROOT
from vzip.media import build_processor
from vzip.models.mini_gemini import MiniGeminiConfig, make_processor

SIDE, PATCH = 112, 14
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
WITH_CLS = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
VIDEO_TOKEN = "<jupyter_script>"
"""An unused special token of SmolLM2's tokenizer, which becomes `<video>`."""


def rename_token(tokenizer: Any, old: str, new: str) -> Any:
    """The tokenizer with a special token under another name."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).glob("tokenizer*.json"):
            path.write_text(path.read_text().replace(old, new))
        return AutoTokenizer.from_pretrained(scratch)


def build_tiny(name: str, architecture: dict[str, Any], tokenizer: Any) -> Any:
    """The processor of a tiny model."""
    if name == "next-tiny":
        images = LlavaNextImageProcessorPil(
            image_grid_pinpoints=architecture["image_grid_pinpoints"], **SQUARE
        )
        return LlavaNextProcessor(images, tokenizer, **WITH_CLS)
    if name == "onevision-tiny":
        pinpoints, size = architecture["image_grid_pinpoints"], {"height": SIDE, "width": SIDE}
        settings = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
        images = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints, size=size)
        return build_processor(LlavaOnevisionProcessor, images, tokenizer, settings)
    if name == "video-llava-tiny":
        return build_processor(VideoLlavaProcessor, VideoLlavaImageProcessor(**SQUARE), tokenizer, WITH_CLS)
    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    return make_processor(MiniGeminiConfig(**settings), tokenizer)


def architectures() -> dict[str, dict[str, Any]]:
    """The architecture of each tiny model, as its config has it."""
    found = {}
    for path in sorted((ROOT / "configs" / "model").glob("*-tiny.yaml")):
        model = OmegaConf.load(path).model
        architecture: dict[str, Any] = OmegaConf.to_container(model.architecture)  # type: ignore[assignment]
        found[path.stem] = architecture | {"model_type": model["_target_"].rsplit(".", 2)[-2]}
    return found


def prepare_tiny(tokenizer_folder: Path, target: Path) -> None:
    """Write a folder for each tiny model below `target`, unless they are there as the configs have them now."""
    wanted, stamp = architectures(), target / "prepared.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return
    tokenizer = rename_token(AutoTokenizer.from_pretrained(tokenizer_folder), VIDEO_TOKEN, "<video>")
    shutil.rmtree(target, ignore_errors=True)
    for name, architecture in wanted.items():
        build_tiny(name, architecture, tokenizer).save_pretrained(target / name)
        (target / name / "config.json").write_text(json.dumps({"model_type": architecture["model_type"]}))
    stamp.write_text(json.dumps(wanted))
