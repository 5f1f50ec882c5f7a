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
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.utils import cached_file

from vzip import sentencepieces
from vzip.errors import UserError
from vzip.renaming import (
    DERIVED,
    LANGUAGE,
    PROJECTOR,
    ROWS,
    TOWER,
    few,
    is_original,
    language_weights,
    projector_weights,
    read_projector,
    text_config,
    tower_weights,
    vocab_size,
)
from vzip.shards import read_tensors, read_weights

__all__ = [
    "find_tower",
    "is_original",
    "language_weights",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "projector_weights",
    "read_config",
    "read_projector",
    "read_tensors",
    "read_weights",
    "text_config",
    "tower_weights",
]

IMAGE = "<image>"
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


def read_config(path: str) -> dict[str, Any]:
    """`config.json` of a folder or hub id. Raises OSError where there is none."""
    config: dict[str, Any] = PreTrainedConfig.get_config_dict(path)[0]
    if not config:
        raise OSError(f"{path} has no config.json")
    return config


def find_tower(path: str, name: str) -> str:
    """Where the tower `name` of the checkpoint `path` is: a folder, or `name` itself as a hub id.

    A folder `name` is taken first, as LLaVA's code does. Then `name`, and its last part, are looked for in the checkpoint's
    folder and beside it: `mm_vision_tower` is often a path on the machine that trained.
    """
    folder = Path(path)
    places = [Path(name)]
    if folder.is_dir():
        places += [base / part for base in (folder, folder.resolve().parent) for part in (name, Path(name).name)]
    return next((str(place) for place in places if (place / "config.json").is_file()), name)


def _refuse_unfit(path: str, config: Mapping[str, Any]) -> None:
    """Raises UserError, before any work, for a setting that the model built here would not have."""
    if str(config.get("image_aspect_ratio")).startswith("anyres"):
        raise _is_next(path, f"image_aspect_ratio is {config['image_aspect_ratio']!r}")
    for key, (absent, allowed) in _SETTINGS.items():
        if (value := config.get(key, absent)) not in allowed:
            raise UserError(
                f"{path}, config.json: {key} is {value!r}, not one of {', '.join(map(repr, allowed))}; give such a checkpoint"
            )
    if not isinstance(layer := config.get("mm_vision_select_layer", -2), int):
        raise UserError(f"{path}, config.json: mm_vision_select_layer is {layer!r}; it must be one whole number, e.g. -2")


def _is_next(path: str, reason: str) -> UserError:
    return UserError(
        f"{path} is a LLaVA-1.6 ({reason}), which cuts a picture into tiles; give its converted form, llava-hf/llava-v1.6-*"
    )


def _tower_config(path: str, name: str) -> tuple[str, Any]:
    """(folder or hub id, CLIPVisionConfig) of the tower. Raises UserError where there is none, or not a CLIP."""
    tower = find_tower(path, name)
    try:
        kind = read_config(tower).get("model_type")
    except OSError as error:
        raise UserError(
            f"{path}, config.json: mm_vision_tower {name!r} is neither a folder, nor lies in the checkpoint's folder or"
            f" beside it, nor can be had from the hub; put its folder beside the checkpoint's: {error}"
        ) from error
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{path}, config.json: mm_vision_tower {name!r} is of the type {kind!r}; a CLIP tower is supported")
    return tower, CLIPVisionConfig.from_pretrained(tower)


def _load_tower(path: str, tower: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the tower that lies outside of the checkpoint, under the names in `CLIPVisionModel`."""
    try:
        model, info = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}, config.json: the weights of mm_vision_tower {tower} can't be loaded: {error}") from error
    if info["missing_keys"]:
        raise UserError(f"mm_vision_tower {tower} lacks {few(info['missing_keys'])}; get the whole of it")
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


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


def _refuse_mismatch(path: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the keys, unless the tensors are the model's, one by one."""
    wrong = []
    if missing := expected.keys() - tensors.keys():
        wrong.append(f"missing are {few(missing)}")
    if surplus := tensors.keys() - expected.keys():
        wrong.append(f"not part of the model are {few(surplus)}")
    shapes = {name: (tuple(tensors[name].shape), tuple(expected[name].shape)) for name in expected.keys() & tensors.keys()}
    if other := [f"{name} {held}, not {wanted}" for name, (held, wanted) in shapes.items() if held != wanted]:
        wrong.append(f"of another shape are {few(other)}")
    if wrong:
        raise UserError(
            f"{path}: the weights do not fit config.json (names as in transformers): {'; '.join(wrong)};"
            " get the whole checkpoint, with its own config.json and tower"
        )


def _convert(path: str, config: Mapping[str, Any], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that the checkpoint holds, under the names in `expected`."""
    weights = read_weights(path)
    if "model.image_newline" in weights:
        raise _is_next(path, "it has model.image_newline")
    tensors = language_weights(weights, config) | projector_weights(weights, path)
    inner = "model.vision_tower."
    if any(name.startswith(f"{inner}vision_model.") for name in expected):  # as earlier versions of transformers name it
        inner += "vision_model."
    tensors |= {inner + name: tensor for name, tensor in tower_weights(weights).items()}
    forms = (LANGUAGE, PROJECTOR, TOWER)
    known = {name for name in weights if name.endswith(DERIVED) or any(form.fullmatch(name) for form in forms)}
    return tensors | {name: weights[name] for name in weights.keys() - known}  # refused by name further on


def load_model(path: str, *, dtype: torch.dtype) -> Any:
    """The checkpoint of a folder or hub id as a `LlavaForConditionalGeneration`, on the CPU, in eval mode.

    Tensors are views of the files until each is cast, so that one copy of the model is held, in `dtype`.

    Raises:
        OSError: no such folder or hub id.
        UserError: a LLaVA-1.6 or another architecture, a tower that can't be found, files that are missing or broken, or
            weights that are not exactly the model's.
    """
    config = read_config(path)
    _refuse_unfit(path, config)
    tower, vision = _tower_config(path, config["mm_vision_tower"])
    llava_config = _llava_config(config, vision)
    with torch.device("meta"):
        expected = LlavaForConditionalGeneration(llava_config).state_dict()
    tensors = _convert(path, config, expected)
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in _load_tower(path, tower, dtype).items()}
    _refuse_mismatch(path, tensors, expected)
    for name in tensors:
        tensors[name] = tensors[name].to(dtype, copy=True)  # also where nothing is cast: the file may change or go
    return LlavaForConditionalGeneration.from_pretrained(None, config=llava_config, state_dict=tensors, dtype=dtype).eval()


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
            tokenizer = sentencepieces.load_tokenizer(path, file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, config=text_config(config))
    except UserError:
        raise
    except Exception as error:  # a broken or missing file raises whatever its parser does
        raise UserError(f"{path}: the tokenizer can't be loaded: {error}; get tokenizer.model and its configs") from error
    if IMAGE not in tokenizer.get_vocab():
        # A vocabulary that was padded has rows that no token has: fewer than 64, or the tokenizer is another model's.
        spare = size - len(tokenizer)
        if 0 <= spare < ROWS:
            tokenizer.add_tokens([AddedToken(f"<unused_{index}>", special=True) for index in range(spare)], special_tokens=True)
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
    """The checkpoint's LlavaProcessor: the tower's own preprocessing, after padding to a square if LLaVA's code pads.

    Raises:
        OSError: no such folder or hub id.
        UserError: as `load_model` and `load_tokenizer`, or a tower without `preprocessor_config.json`.
    """
    config = read_config(path)
    _refuse_unfit(path, config)
    tower, vision = _tower_config(path, config["mm_vision_tower"])
    try:
        images = LlavaImageProcessorPil.from_pretrained(tower, do_pad=config.get("image_aspect_ratio") == "pad")
    except OSError as error:
        raise UserError(f"mm_vision_tower {tower} has no preprocessor_config.json that can be read: {error}") from error
    return LlavaProcessor(
        images,
        load_tokenizer(path),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_STRATEGIES[config.get("mm_vision_select_feature", "patch")],
        num_additional_image_tokens=1,  # CLIP's CLS
    )
