"""Checkpoints of LLaVA's own code, as they are: no conversion step.

A folder or hub id such as `liuhaotian/llava-v1.5-7b` has Llama's settings and `mm_*` keys in one `config.json`, weights under
the names of `LlavaLlamaForCausalLM`, no `<image>` in its tokenizer, and its vision tower elsewhere (`mm_vision_tower`). Here it
becomes a `LlavaForConditionalGeneration` and its processor. Source of the layout: repository haotian-liu/LLaVA,
`llava/model/llava_arch.py`, `llava/model/builder.py` and `llava/model/multimodal_encoder/clip_encoder.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
)
from transformers.utils import cached_file

from vzip.checkpoints.original import sentencepieces
from vzip.checkpoints.original.renaming import (
    DERIVED,
    LANGUAGE,
    PROJECTOR,
    ROWS,
    TOWER,
    check_settings,
    fill,
    language_weights,
    projector_weights,
    text_config,
    tower_weights,
    vocab_size,
)
from vzip.checkpoints.original.towers import clip_weights, find_clip
from vzip.checkpoints.shards import read_config, read_weights
from vzip.errors import UserError
from vzip.templates.encode import IMAGE, vicuna
from vzip.templates.jinja import chat_template

_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_SETTINGS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("llava", "llava_llama")),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", tuple(_STRATEGIES)),
    "image_aspect_ratio": (None, ("pad", "square", None)),
    "mm_use_im_start_end": (False, (False,)),
    "s2": (False, (False,)),
}
"""Setting: what LLaVA's code takes where it is absent, and the values that can be had here."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in the layout of LLaVA's own code, or of code made from it."""
    return config.get("mm_vision_tower") is not None


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    """Raises UserError, before any work, for a setting that the model built here would not have."""
    if str(config.get("image_aspect_ratio")).startswith("anyres"):
        raise _is_next(path, f"image_aspect_ratio is {config['image_aspect_ratio']!r}")
    check_settings(path, config, _SETTINGS)
    if not isinstance(layer := config.get("mm_vision_select_layer", -2), int):
        raise UserError(
            f"{path}, config.json: mm_vision_select_layer is {layer!r}; it must be one whole number, e.g. -2"
        )


def _is_next(path: str, reason: str) -> UserError:
    return UserError(
        f"{path} is a LLaVA-1.6 ({reason}), which cuts a picture into tiles; give its converted form, llava-hf/llava-v1.6-*"
    )


def _llava_config(config: Mapping[str, Any], vision: Any) -> Any:
    strategy = _STRATEGIES[config.get("mm_vision_select_feature", "patch")]
    text = text_config(config)
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab_size(config),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (strategy == "full"),
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _convert(path: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors that the checkpoint holds, under the names in `LlavaForConditionalGeneration`."""
    weights = read_weights(path)
    if "model.image_newline" in weights:
        raise _is_next(path, "it has model.image_newline")
    tensors = language_weights(weights, config) | projector_weights(weights, path)
    tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in tower_weights(weights).items()}
    forms = (LANGUAGE, PROJECTOR, TOWER)
    known = {
        name for name in weights if name.endswith(DERIVED) or any(form.fullmatch(name) for form in forms)
    }
    return tensors | {name: weights[name] for name in weights.keys() - known}  # refused by name further on


def load_model(path: str, *, dtype: torch.dtype) -> Any:
    """The checkpoint of a folder or hub id as a `LlavaForConditionalGeneration`, on the CPU, in eval mode.

    Raises:
        OSError: no such folder or hub id.
        UserError: a LLaVA-1.6 or another architecture, a tower that can't be found, files that are missing or broken, or
            weights that are not exactly the model's.
    """
    config = read_config(path)
    _check_config(path, config)
    tower, vision = find_clip(path, config["mm_vision_tower"])
    tensors = _convert(path, config)
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors |= {
            f"model.vision_tower.{name}": tensor for name, tensor in clip_weights(path, tower, dtype).items()
        }
    return fill(path, LlavaForConditionalGeneration, _llava_config(config, vision), tensors, dtype=dtype)


def _file(path: str, name: str) -> Path | None:
    """A file of a folder or hub id, on disk, if it has it."""
    try:
        return Path(cached_file(path, name))
    except OSError:
        return None


def load_tokenizer(path: str) -> Any:
    """The checkpoint's tokenizer with `<image>`, whose id is the original vocab_size.

    LLaVA's code has no such token: it cuts the text at `<image>` and puts IMAGE_TOKEN_INDEX (-200) between.

    Raises:
        OSError: no such folder or hub id.
        UserError: no tokenizer, or one that does not fit `vocab_size`.
    """
    config = read_config(path)
    size = vocab_size(config)
    try:
        file = _file(path, "tokenizer.model")
        if file and not _file(path, "tokenizer.json"):
            tokenizer = sentencepieces.load_sentencepiece_tokenizer(path, file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, config=text_config(config))
    except UserError:
        raise
    except Exception as error:  # a broken or missing file raises whatever its parser does
        raise UserError(
            f"{path}: the tokenizer can't be loaded: {error}; get tokenizer.model and its configs"
        ) from error
    if IMAGE not in tokenizer.get_vocab():
        # A vocabulary that was padded has rows that no token has: fewer than 64, or the tokenizer is another model's.
        spare = size - len(tokenizer)
        if 0 <= spare < ROWS:
            tokenizer.add_tokens(
                [AddedToken(f"<unused_{index}>", special=True) for index in range(spare)], special_tokens=True
            )
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if (image := tokenizer.convert_tokens_to_ids(IMAGE)) != size:
        raise UserError(
            f"{path}: the tokenizer has {IMAGE} at {image}, but vocab_size in config.json is {size}, which must be the id after"
            " the last one; get the checkpoint's own tokenizer files"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token  # as llava/train/train.py does
    return tokenizer


def load_processor(path: str) -> Any:
    """The checkpoint's LlavaProcessor: the tower's own preprocessing, after padding to a square if LLaVA's code pads, and the
    chat template of Vicuna, which the file does not name, but LLaVA-1.5 was trained with.

    Raises:
        OSError: no such folder or hub id.
        UserError: as `load_family` and `load_sentencepiece_tokenizer`, or a tower without `preprocessor_config.json`.
    """
    config = read_config(path)
    _check_config(path, config)
    tower, vision = find_clip(path, config["mm_vision_tower"])
    try:
        images = LlavaImageProcessorPil.from_pretrained(
            tower, do_pad=config.get("image_aspect_ratio") == "pad"
        )
    except OSError as error:
        raise UserError(
            f"mm_vision_tower {tower} has no preprocessor_config.json that can be read: {error}"
        ) from error
    tokenizer = load_tokenizer(path)
    return LlavaProcessor(
        images,
        tokenizer,
        chat_template=chat_template(vicuna(), tokenizer),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_STRATEGIES[config.get("mm_vision_select_feature", "patch")],
        num_additional_image_tokens=1,  # CLIP's CLS
    )
