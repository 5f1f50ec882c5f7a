"""Write `config.json` in the layout of LLaVA's own code, for a LLaVA-1.5 of `transformers`."""

from typing import Any

CLIP_336 = "openai/clip-vit-large-patch14-336"
_CLIP_336_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}

_FEATURES = {"default": "patch", "full": "cls_patch"}
"""LLaVA's names for the tokens that are taken from the tower, by those of transformers."""

_ONLY_TRANSFORMERS = ("model_type", "dtype", "architectures", "transformers_version", "_name_or_path")
"""Keys of a text config that LLaVA's code lacks, or fills with other values."""


def export_config(config: Any, processor: Any) -> dict[str, Any] | None:
    """Make the `config.json` that LLaVA's loader needs beside the projector.

    Args:
        config: the config of a `LlavaForConditionalGeneration`.
        processor: the model's processor.

    Returns:
        The content of `config.json`. None unless the language model is a Llama and the tower is the
        CLIP of LLaVA-1.5, which the loader finds by its name.
    """
    # LLaVA's config has one number for rotary positions, so it can't describe scaled ones.
    text = config.text_config
    is_llama = text.model_type == "llama" and text.rope_parameters["rope_type"] == "default"

    vision = config.vision_config
    is_clip = vision.model_type == "clip_vision_model"
    if not is_llama or not is_clip:
        return None

    # A CLIP of another shape is not the one of this hub id.
    if any(getattr(vision, name) != value for name, value in _CLIP_336_SHAPE.items()):
        return None
    return llava_config(config, processor, CLIP_336)


def llava_config(config: Any, processor: Any, tower: str) -> dict[str, Any]:
    """Make `config.json` in LLaVA's layout; `tower` is the hub id of the model's CLIP."""
    # LLaVA's code has no config inside a config: Llama's settings stand at the top level.
    text: dict[str, Any] = config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    for name in _ONLY_TRANSFORMERS:
        text.pop(name, None)

    pads = getattr(processor.image_processor, "do_pad", False)
    return text | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        # `<image>` was the first token behind the original vocabulary, so its id is the size.
        "vocab_size": config.image_token_id,
        "rope_theta": rope["rope_theta"],
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": _FEATURES[config.vision_feature_select_strategy],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if pads else None,
    }
