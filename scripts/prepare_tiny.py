"""Write the processors of the tiny models (`model=next-tiny` and the like): the embedded default's tokenizer, and pictures of
112 pixels. Their weights are random, made at each start from the architecture in their config.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, from wherever this file is started

from hydra import compose, initialize_config_dir
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

from data.paths import data_dir
from train.config import ROOT, register, teach
from vzip import UserError
from vzip.media import build_processor
from vzip.mini_gemini import MiniGeminiConfig, make_processor

SIDE, PATCH = 112, 14
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
WITH_CLS = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
VIDEO_TOKEN = "<jupyter_script>"
"""An unused special token of SmolLM2's tokenizer, which becomes `<video>`."""


def load_tokenizer(folder: Path) -> Any:
    """The embedded default's tokenizer, with `<video>`."""
    with tempfile.TemporaryDirectory() as scratch:
        AutoTokenizer.from_pretrained(folder).save_pretrained(scratch)
        for path in Path(scratch).glob("tokenizer*.json"):
            path.write_text(path.read_text().replace(VIDEO_TOKEN, "<video>"))
        return AutoTokenizer.from_pretrained(scratch)


def build(name: str, architecture: dict[str, Any], tokenizer: Any) -> Any:
    """The processor of a tiny model."""
    if name == "next-tiny":
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=architecture["image_grid_pinpoints"], **SQUARE)
        return LlavaNextProcessor(images, tokenizer, **WITH_CLS)
    if name == "onevision-tiny":
        pinpoints, size = architecture["image_grid_pinpoints"], {"height": SIDE, "width": SIDE}
        settings = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
        images = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints, size=size)
        return build_processor(LlavaOnevisionProcessor, images, tokenizer, settings)
    if name == "video-llava-tiny":
        return build_processor(VideoLlavaProcessor, VideoLlavaImageProcessor(**SQUARE), tokenizer, WITH_CLS)
    return make_processor(MiniGeminiConfig(**architecture), tokenizer)


@teach
def main() -> None:
    register()
    tokenizer_folder, target = data_dir() / "smol" / "model", data_dir() / "tiny"
    if not tokenizer_folder.is_dir():
        raise UserError(f"{tokenizer_folder} is not there: run scripts/prepare_smol.py, or `make data`, which runs both")
    tokenizer = load_tokenizer(tokenizer_folder)
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted((ROOT / "configs" / "model").glob("*-tiny.yaml")):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("tune", overrides=[f"model={path.stem}"])
        architecture = OmegaConf.to_container(cfg.model.architecture)
        build(path.stem, architecture, tokenizer).save_pretrained(target / path.stem)
        (target / path.stem / "config.json").write_text(json.dumps({"model_type": cfg.model["_target_"].rsplit(".", 2)[-2]}))
    print(f"prepared the tiny models' processors: {target}")


if __name__ == "__main__":
    main()
