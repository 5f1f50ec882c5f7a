"""Models with random weights to measure, and the options that make vLLM keep all tokens."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from scripts.bench.shapes import Shape, shape_of, shrink
from vzip.reducers.identity import Identity
from vzip.runs.meta import EXPORT, FORMAT
from vzip.runs.schema import ARCHITECTURE

SHAPES = ("tiny", "llava-7b", "llava-13b", "next-7b")

DIVISORS = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 8,
    "image_token_index": 8,
}
"""What the sizes of LLaVA-1.5-7B are divided by for the shape "tiny": width 512, 8 layers."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endfor %}"
)


def served_shape(name: str) -> Shape:
    """Return a shape of `SHAPES`. Pictures have all 576 patches also in the tiny one."""
    if name != "tiny":
        return shape_of(name)
    large = shape_of("llava-7b")
    return replace(large, name=name, architecture=shrink(large.architecture, DIVISORS), dtype=torch.float32)


def _tokenizer(size: int, image_id: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes. Tokens without a meaning fill its vocabulary up to a size."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for index in range(len(vocabulary), size):
        vocabulary["<image>" if index == image_id else f"<{index}>"] = index

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=["<image>"],
    )


def save_random_model(shape: Shape, folder: Path) -> None:
    """Write everything of a model but its weights, which vLLM draws itself (`--load-format dummy`)."""
    config: Any = shape.family.model_class.config_class(**shape.architecture)  # type: ignore[attr-defined]
    config.architectures = [ARCHITECTURE, shape.family.model_class.__name__]
    config.dtype = str(shape.dtype).removeprefix("torch.")
    config.save_pretrained(folder)

    side = config.vision_config.image_size
    square = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer = _tokenizer(config.text_config.vocab_size, config.image_token_id)
    processor: Any
    if shape.family.model_type == "llava_next":
        pinpoints = shape.architecture["image_grid_pinpoints"]
        pictures = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **square)
        processor = LlavaNextProcessor(pictures, tokenizer, **settings)
    else:
        processor = LlavaProcessor(CLIPImageProcessorPil(**square), tokenizer, **settings)
    processor.save_pretrained(folder)


def reduced_by(shape: Shape) -> list[str]:
    """Return the options of vLLM that put a shape's own reducer in front of it."""
    reducer = shape.reducer
    description = {"name": reducer.name, **reducer.settings()}
    return overrides({"format": FORMAT, "budget": shape.budget, "reducer": description})


def all_tokens(meta: Mapping[str, Any] | None = None) -> list[str]:
    """Return the options of vLLM that keep all tokens.

    Args:
        meta: the card of an exported model. None for a model without a card.
    """
    without = {"format": FORMAT, "reducer": {"name": Identity.name}, "other_budgets": {}}
    kept = {name: value for name, value in (meta or {}).items() if name not in ("budget", *without)}
    return overrides({**kept, **without})


def overrides(card: Mapping[str, Any]) -> list[str]:
    """Return the options of vLLM that replace the card in config.json."""
    return ["--hf-overrides", json.dumps({EXPORT: card})]
