"""Checkpoints of LLaVA's own code, loaded without a conversion step.

A folder or hub id such as `liuhaotian/llava-v1.5-7b` has Llama's settings and `mm_*` keys in one
`config.json`, weights under the names of `LlavaLlamaForCausalLM`, and no `<image>` in its
tokenizer. Its vision tower is elsewhere (`mm_vision_tower`). Here it becomes a
`LlavaForConditionalGeneration` and its processor. Source of the layout: repository
haotian-liu/LLaVA, `llava/model/llava_arch.py`, `llava/model/builder.py` and
`llava/model/multimodal_encoder/clip_encoder.py`.
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

from vzip.checkpoints import hf
from vzip.checkpoints.original import sentencepieces
from vzip.checkpoints.original.renaming import (
    DERIVED,
    LANGUAGE,
    PROJECTOR,
    TOWER,
    VOCABULARY_MULTIPLE,
    build_model,
    check_settings,
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
"""LLaVA's names for the tokens that are taken from the tower, and those of transformers."""

_SETTINGS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("llava", "llava_llama")),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", tuple(_STRATEGIES)),
    "image_aspect_ratio": (None, ("pad", "square", None)),
    "mm_use_im_start_end": (False, (False,)),
    "s2": (False, (False,)),
}
"""For each setting, LLaVA's default, and the values that are supported here."""


# Config


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is in the layout of LLaVA's own code."""
    # Mini-Gemini's code was made from LLaVA's, and names a second tower beside the first one.
    has_second_tower = config.get("mm_vision_tower_aux") is not None
    return config.get("mm_vision_tower") is not None and not has_second_tower


def _llava_next_error(path: str, reason: str) -> UserError:
    return UserError(
        f"{path} is a LLaVA-1.6 ({reason}), which cuts a picture into tiles; "
        "give its converted form, llava-hf/llava-v1.6-*"
    )


def _check_config(path: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that the model built here would not have."""
    # LLaVA-1.6 has the same model_type, so it is recognised by its tiles.
    aspect_ratio = config.get("image_aspect_ratio")
    if str(aspect_ratio).startswith("anyres"):
        raise _llava_next_error(path, f"image_aspect_ratio is {aspect_ratio!r}")

    check_settings(path, config, _SETTINGS)

    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise UserError(
            f"{path}, config.json: mm_vision_select_layer is {layer!r}; it must be one whole number, e.g. -2"
        )


def _llava_config(config: Mapping[str, Any], vision: Any) -> Any:
    """Make the LlavaConfig of a checked config.json and a CLIPVisionConfig."""
    # LLaVA's default is "patch". With "cls_patch" the tower's CLS token is one visual token more.
    text = text_config(config)
    strategy = _STRATEGIES[config.get("mm_vision_select_feature", "patch")]
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab_size(config),
        image_seq_length=num_patches + 1 if strategy == "full" else num_patches,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )


# Weights


def _llava_weights(path: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the checkpoint's tensors, named as in `LlavaForConditionalGeneration`."""
    # The tensor tells a LLaVA-1.6 even if its config.json does not mention tiles.
    weights = read_weights(path)
    if "model.image_newline" in weights:
        raise _llava_next_error(path, "it has model.image_newline")

    tensors = language_weights(weights, config)
    tensors |= projector_weights(weights, path)
    tensors |= tower_weights(weights)

    # Unknown tensors keep their names, under which `build_model` refuses them.
    for name, tensor in weights.items():
        is_known = any(pattern.fullmatch(name) for pattern in (LANGUAGE, PROJECTOR, TOWER))
        if not is_known and not name.endswith(DERIVED):
            tensors[name] = tensor
    return tensors


def load_model(path: str, *, dtype: torch.dtype) -> Any:
    """Load a checkpoint as a `LlavaForConditionalGeneration`, on the CPU, in eval mode.

    Args:
        path: a folder or hub id.
        dtype: the precision of the weights.

    Raises:
        OSError: there is no such folder or hub id.
        UserError: it is a LLaVA-1.6 or another architecture, a tower can't be found, files are
            missing or broken, or the weights are not exactly the model's.
    """
    config = read_config(path)
    _check_config(path, config)
    tower, vision = find_clip(path, config["mm_vision_tower"])

    # A checkpoint holds its tower only if that was tuned. Otherwise it is the public CLIP.
    tensors = _llava_weights(path, config)
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors |= clip_weights(path, tower, dtype)

    model_config = _llava_config(config, vision)
    return build_model(path, LlavaForConditionalGeneration, model_config, tensors, dtype=dtype)


# Tokenizer and processor


def _find_file(path: str, name: str) -> Path | None:
    """Find a file of a folder or hub id on disk; None if it is missing."""
    try:
        return Path(cached_file(path, name))
    except OSError:
        return None


def _read_tokenizer(path: str, config: Mapping[str, Any]) -> Any:
    """Load the tokenizer as it was saved. Raises UserError if it can't be loaded."""
    try:
        # transformers would convert tokenizer.model too, but with other ids for white space.
        pieces = _find_file(path, "tokenizer.model")
        if pieces is not None and _find_file(path, "tokenizer.json") is None:
            return sentencepieces.load_sentencepiece_tokenizer(path, pieces)
        return AutoTokenizer.from_pretrained(path, config=text_config(config), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        # The parser of a broken or missing file raises errors of any kind.
        if hf.needs_own_code(error):
            raise hf.own_code_error(path) from error
        raise UserError(
            f"{path}: the tokenizer can't be loaded: {error}; get tokenizer.model and its configs"
        ) from error


def load_tokenizer(path: str) -> Any:
    """Load the checkpoint's tokenizer, and add `<image>` behind its vocabulary.

    LLaVA's code has no such token. It cuts the text at `<image>`, and puts IMAGE_TOKEN_INDEX (-200)
    between the pieces.

    Raises:
        OSError: there is no such folder or hub id.
        UserError: there is no tokenizer, or it does not fit `vocab_size`.
    """
    config = read_config(path)
    size = vocab_size(config)
    tokenizer = _read_tokenizer(path, config)

    if IMAGE not in tokenizer.get_vocab():
        # `<image>` must get the id vocab_size, so fill the few ids that a padded vocabulary leaves
        # without a token. If more are left, the tokenizer is another model's.
        num_spare = size - len(tokenizer)
        if 0 <= num_spare < VOCABULARY_MULTIPLE:
            unused = [AddedToken(f"<unused_{index}>", special=True) for index in range(num_spare)]
            tokenizer.add_tokens(unused, special_tokens=True)
        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)

    # The model's embedding has the vector of `<image>` behind those of the original vocabulary.
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    if image_id != size:
        raise UserError(
            f"{path}: the tokenizer has {IMAGE} at {image_id}, but vocab_size in config.json is "
            f"{size}, which must be the id after the last one; get the checkpoint's own tokenizer files"
        )

    # Llama has no token for padding; llava/train/train.py takes the unknown token too.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def load_processor(path: str) -> Any:
    """Load the checkpoint's LlavaProcessor.

    It prepares pictures as the tower does, after padding them to a square if LLaVA's code pads. Its
    chat template is Vicuna's: the checkpoint does not name it, but LLaVA-1.5 was trained with it.

    Raises:
        OSError: there is no such folder or hub id.
        UserError: a setting is not supported, the tokenizer can't be loaded, or the tower has no
            `preprocessor_config.json`.
    """
    config = read_config(path)
    _check_config(path, config)

    # The tower's own folder says how its pictures are resized and normalized.
    tower, vision = find_clip(path, config["mm_vision_tower"])
    try:
        pads = config.get("image_aspect_ratio") == "pad"
        images = LlavaImageProcessorPil.from_pretrained(tower, do_pad=pads, trust_remote_code=False)
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
        # CLIP's CLS, which the processor subtracts again if the strategy drops it.
        num_additional_image_tokens=1,
    )
