"""Tiny models with random weights, whole on disk as a user's would be: built in well under a second, never downloaded."""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from vzip.families import families
from vzip.media import MediaInputs, build_processor
from vzip.models.mini_gemini import MiniGeminiConfig, make_processor

GRID, PATCH, LAYERS = 4, 14, 4
SIDE = GRID * PATCH
TOWERS = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 64, "projection_dim": 16},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, "use_mask_token": False},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 64, "vision_use_head": False},
    "vit": {"model_type": "vit", "intermediate_size": 64},
}
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<video>"]


def tokenizer(special=tuple(SPECIAL)):
    """Bytes, and the special tokens of all templates: 263 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=list(special[3:]),
    )


def pinpoints(grid=GRID):
    """(height, width) that an image of several tiles is fitted into: 2 to 9 tiles behind the base tile."""
    side = grid * PATCH
    return [
        [rows * side, columns * side] for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3))
    ]


KINDS = {  # a family's model_type, its vision tower, and what else its config holds
    "clip": ("llava", "clip", {}),
    "dinov2": ("llava", "dinov2", {}),
    "siglip": ("llava", "siglip", {"vision_feature_select_strategy": "full"}),
    "vit": ("llava", "vit", {}),
    "next": ("llava_next", "clip", {}),
    "next-siglip": ("llava_next", "siglip", {"vision_feature_select_strategy": "full"}),
    "onevision": (
        "llava_onevision",
        "siglip",
        {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4"},
    ),
    "video": ("video_llava", "clip", {}),
    "mini-gemini": ("mini_gemini", "clip", {}),
}
TILED = ("next", "next-siglip", "onevision")
VIDEO = tuple(kind for kind, (model_type, *_) in KINDS.items() if "video" in families()[model_type].kinds)


def architecture(kind="clip", *, grid=GRID, layers=LAYERS, width=32):
    """Arguments of the config of a kind in `KINDS`, with a tower of `layers` layers on `grid` x `grid` patches."""
    _, tower, more = KINDS[kind]
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": grid * PATCH,
        "patch_size": PATCH,
        **TOWERS[tower],
    }
    text = {
        "model_type": "qwen2" if kind == "onevision" else "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(SPECIAL) + 256,
        "max_position_embeddings": 2048,
    }
    tiles = {"image_grid_pinpoints": pinpoints(grid)} if kind in TILED else {"image_seq_length": grid * grid}
    if kind == "mini-gemini":
        more = {"high_resolution_config": {"depths": [1, 1], "hidden_sizes": [8, 16], "image_size": 8 * grid}}
    videos = {"video_token_index": SPECIAL.index("<video>")} if kind in ("onevision", "video") else {}
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": SPECIAL.index("<image>"),
        "vision_feature_layer": -2,
        **tiles,
        **videos,
        **more,
    }


def llava(kind="clip", *, seed=0, dtype=torch.float32, **shape):
    """A model of a kind with weights scaled up, so that attention is not near uniform and top-k is no tie."""
    torch.manual_seed(seed)
    model = families()[KINDS[kind][0]].from_architecture(architecture(kind, **shape), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_tower" in name and "_proj.weight" in name:
                parameter.normal_(std=0.4)
        for name, parameter in model.named_parameters():
            if "patch_embedding" in name or "projection.weight" in name:
                parameter.normal_(std=0.1)
    return model.to(dtype)


def processor(kind="clip", *, grid=GRID):
    """The processor of `llava(kind, grid=grid)`."""
    side, (model_type, tower, _) = grid * PATCH, KINDS[kind]
    has_cls = tower != "siglip"
    square = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    layout = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default" if has_cls else "full",
        "num_additional_image_tokens": int(has_cls),
    }
    if model_type == "mini_gemini":
        return make_processor(MiniGeminiConfig(**architecture(kind, grid=grid)), tokenizer())
    if model_type == "llava_next":
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints(grid), **square), tokenizer(), **layout
        )
    if model_type == "llava_onevision":
        size = {"height": side, "width": side}
        images = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=pinpoints(grid), size=size)
        settings = {
            "num_image_tokens": grid * grid,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        }
        return build_processor(LlavaOnevisionProcessor, images, tokenizer(), settings)
    if model_type == "video_llava":
        return build_processor(VideoLlavaProcessor, VideoLlavaImageProcessor(**square), tokenizer(), layout)
    return LlavaProcessor(CLIPImageProcessorPil(**square), tokenizer(), **layout)


def save_llava(folder: Path, kind="clip", *, seed=0, **shape) -> Path:
    """Write model and processor to `folder`, as `from_pretrained` reads them."""
    llava(kind, seed=seed, **shape).save_pretrained(folder)
    processor(kind, grid=shape.get("grid", GRID)).save_pretrained(folder)
    return folder


def picture(seed=0, height=SIDE, width=None) -> Image.Image:
    """A noisy picture, by default a square: no two patches alike."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width or height, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def video(seed=0, num_frames=3) -> list[Image.Image]:
    """Noisy frames."""
    return [picture(1000 * seed + frame) for frame in range(num_frames)]


def save_mixed_data(folder: Path, kind: str) -> Path:
    """12 rows of pictures of mixed sizes, of two pictures, of text, and, for models that take them, of videos."""
    sizes, rows = [(SIDE, SIDE), (40, 90), (150, 60)], []
    for index in range(12):
        row, prefix = {"id": f"row-{index}"}, ""
        if index % 4 == 3 and kind in VIDEO:
            row["video"], prefix = f"clips/{index}", "<video>\n"
            (folder / "images" / row["video"]).mkdir(parents=True)
            for frame, image in enumerate(video(index, 4)):
                image.save(folder / "images" / row["video"] / f"{frame}.png")
        elif index % 6 != 5:
            names = [f"noise/{index}-{number}.png" for number in range(2 if index % 4 == 0 else 1)]
            (folder / "images" / "noise").mkdir(parents=True, exist_ok=True)
            for number, name in enumerate(names):
                picture(index + 100 * number, *sizes[(index + number) % 3]).save(folder / "images" / name)
            row["image"], prefix = names, "<image>\n" * len(names)
        question = {"from": "human", "value": f"{prefix}what is in {index}?"}
        row["conversations"] = [question, {"from": "gpt", "value": f"noise {index % 7}"}]
        rows.append(row)
    target = folder / "train.json"
    target.write_text(json.dumps(rows))
    return target


def save_data(folder: Path, num_examples=24, *, text_only=2, held_out=False, seed=0) -> Path:
    """Write rows in LLaVA's format with their pictures below `folder`/images: the path of the JSON file."""
    rows = []
    for index in range(num_examples):
        name = f"noise/{'test' if held_out else 'train'}{index}.png"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed * 1000 + index).save(path)
        question, answer = f"what is in picture {index}?", f"noise {index % 7}"
        row = {"id": f"row-{index}", "image": name, "conversations": []}
        if index < text_only:
            del row["image"]
        turns = 1 if held_out else 1 + index % 3
        for turn in range(turns):
            prefix = "<image>\n" if "image" in row and turn == 0 else ""
            row["conversations"] += [
                {"from": "human", "value": prefix + question},
                {"from": "gpt", "value": answer},
            ]
        if held_out:
            row["type"] = "open" if index % 2 else "yesno"
        rows.append(row)
    target = folder / ("test.json" if held_out else "train.json")
    target.write_text(json.dumps(rows))
    return target


def media_arguments(kind, processed):
    """The model's arguments for the images, or the videos, that a processor returned."""
    return MediaInputs.from_processed(kind, processed).arguments


def reduce(handle, pixel_values):
    """What the attached reducer makes of float[B, 3, height, width]: the tokens before the projector."""
    return handle.reducer(handle.family.vision_tokens(handle.reducer, pixel_values))


def exact(model):
    """The model with its norms in its own precision: transformers' own compute in float32, float64 models too."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(hidden, module=module):
                return (
                    module.weight
                    * hidden
                    * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
                )

            module.forward = forward
    return model
