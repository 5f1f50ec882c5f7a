"""Tiny models, processors and data. They are built in well under a second, and never downloaded."""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from vzip.families import families
from vzip.families.patches import FramePatchProcessor
from vzip.families.qwen3_vl import Qwen3Frames
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


def tokenizer(special=tuple(SPECIAL), *, names=None):
    """A tokenizer of bytes, with the special tokens of all templates: 263 ids. `names` are attributes
    for some of them.
    """
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
        extra_special_tokens=list(special[3:]) if names is None else names | named_by_themselves(special[3:]),
    )


def named_by_themselves(tokens):
    return {f"{token}_token": token for token in tokens}


def pinpoints(grid=GRID):
    """(height, width) that an image of several tiles is fitted into: 2 to 9 tiles beside the base tile."""
    side = grid * PATCH
    shapes = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3)]
    return [[rows * side, columns * side] for rows, columns in shapes]


KINDS = {  # (model_type of the family, vision tower, more of the config)
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
    "qwen2.5-vl": ("qwen2_5_vl", "qwen2_5_vl", {}),
    "qwen3-vl": ("qwen3_vl", "qwen3_vl", {}),
    "internvl": ("internvl", "internvl", {}),
}
NATIVE = ("qwen2.5-vl", "qwen3-vl")
"""Kinds that take pictures of any size. Their tokens are groups of 2 x 2 patches."""
SHUFFLED = ("internvl",)
"""Kinds whose tokens are groups of 2 x 2 patches, in tiles of one size."""
TILED = ("next", "next-siglip", "onevision")
VIDEO = tuple(kind for kind, (model_type, *_) in KINDS.items() if "video" in families()[model_type].kinds)


def architecture(kind="clip", *, grid=GRID, layers=LAYERS, width=32, text_width=48):
    """Arguments of the config of a kind in `KINDS`, with a tower of `layers` layers on `grid` x `grid`
    patches.
    """
    _, tower, more = KINDS[kind]
    if kind in NATIVE:
        return native_architecture(kind, layers=layers, width=width)
    if kind in SHUFFLED:
        return shuffled_architecture(grid=grid, layers=layers, width=width)
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
        **TEXT,
        "hidden_size": text_width,
        "intermediate_size": 2 * text_width,
    }
    config = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": SPECIAL.index("<image>"),
        "vision_feature_layer": -2,
        **more,
    }
    if kind in TILED:
        config["image_grid_pinpoints"] = pinpoints(grid)
    else:
        config["image_seq_length"] = grid * grid
    if kind == "mini-gemini":
        config["high_resolution_config"] = {
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "image_size": 8 * grid,
        }
    if kind in ("onevision", "video"):
        config["video_token_index"] = SPECIAL.index("<video>")
    return config


TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(SPECIAL) + 256,
    "max_position_embeddings": 2048,
}


def native_architecture(kind, *, layers=LAYERS, width=32):
    """Like `architecture`. Only every second layer of the tower, and the last, sees whole pictures."""
    vision = {
        "model_type": "qwen2_5_vl_vision",
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": sorted({1, layers - 1}),
        "out_hidden_size": 48,
        "tokens_per_second": 2,
    }
    ends = {"bos_token_id": SPECIAL.index("<s>"), "eos_token_id": SPECIAL.index("</s>")}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 2, 2]}
    if kind == "qwen3-vl":
        # Every layer sees whole pictures, and two of them are added to those of the language model.
        del vision["window_size"], vision["fullatt_block_indexes"], vision["tokens_per_second"]
        vision |= {
            "model_type": "qwen3_vl_vision",
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        }
        rope["mrope_interleaved"] = True
        text = {
            "model_type": "qwen3_vl_text",
            "rope_parameters": rope,
            **TEXT,
            "num_hidden_layers": 3,
            "head_dim": 12,
        }
        return {
            "vision_config": vision,
            "text_config": text | {"bos_token_id": 1, "eos_token_id": 2},
            "image_token_id": SPECIAL.index("<image>"),
            "video_token_id": SPECIAL.index("<video>"),
        }
    return {
        "vision_config": vision,
        "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": rope, **TEXT, **ends},
        "image_token_id": SPECIAL.index("<image>"),
        "video_token_id": SPECIAL.index("<video>"),
    }


def shuffled_architecture(*, grid=GRID, layers=LAYERS, width=32):
    """Like `architecture`, of an InternVL with a tile of `grid` x `grid` tokens."""
    side, patch = grid * PATCH, PATCH // 2
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "attention_bias": True,
        "image_size": [side, side],
        "patch_size": [patch, patch],
    }
    return {
        "vision_config": vision,
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_token_id": SPECIAL.index("<image>"),
        "image_seq_length": grid * grid,
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
    }


def llava(kind="clip", *, seed=0, dtype=torch.float32, **shape):
    """A model of a kind in `KINDS`.

    Its weights are scaled up, so that attention is far from uniform and the order of saliency is clear.
    """
    torch.manual_seed(seed)
    model = families()[KINDS[kind][0]].from_architecture(architecture(kind, **shape), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("_tower" in name and "_proj.weight" in name) or "attn.qkv.weight" in name:
                parameter.normal_(std=0.4)
        for name, parameter in model.named_parameters():
            if "patch_embed" in name or "projection.weight" in name:
                parameter.normal_(std=0.1)
        if kind in NATIVE:
            # Random weights might write a placeholder, for which there is no picture.
            model.lm_head.weight[[SPECIAL.index("<image>"), SPECIAL.index("<video>")]] = 0.0
    return model.to(dtype)


def processor(kind="clip", *, grid=GRID):
    """The processor of `llava(kind, grid=grid)`."""
    side = grid * PATCH
    model_type, tower, _ = KINDS[kind]
    if kind in NATIVE:
        return native_processor(kind)
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
    if kind in SHUFFLED:
        return shuffled_processor(grid=grid)
    if model_type == "video_llava":
        return build_processor(VideoLlavaProcessor, VideoLlavaImageProcessor(**square), tokenizer(), layout)
    return LlavaProcessor(CLIPImageProcessorPil(**square), tokenizer(), **layout)


def native_processor(kind):
    """The processor of a kind in `NATIVE`. Every picture has at least 16 tokens."""
    size = {"shortest_edge": SIDE * SIDE * 4, "longest_edge": 2 * SIDE * SIDE * 4}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)
    named = tokenizer(names={"image_token": "<image>", "video_token": "<video>"})
    if kind == "qwen3-vl":
        return build_processor(Qwen3VLProcessor, images, named, {}, frame_processor=Qwen3Frames)
    return build_processor(Qwen2_5_VLProcessor, images, named, {}, frame_processor=FramePatchProcessor)


MARKUP = {
    "start_image_token": "<|im_start|>",
    "context_image_token": "<image>",
    "end_image_token": "<|im_end|>",
    "video_token": "<video>",
}


def marked(kind, text):
    """Write the tokens around each image that the model's processor writes."""
    if kind not in SHUFFLED:
        return text
    return text.replace("<image>", MARKUP["start_image_token"] + "<image>" + MARKUP["end_image_token"])


def shuffled_processor(*, grid=GRID):
    """The processor of an InternVL, which cuts a picture into up to 4 tiles."""
    size = {"height": grid * PATCH, "width": grid * PATCH}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4)
    named = tokenizer(names=MARKUP)
    return build_processor(InternVLProcessor, images, named, {"image_seq_length": grid * grid})


def save_llava(folder: Path, kind="clip", *, seed=0, **shape) -> Path:
    """Write model and processor to `folder`, as `from_pretrained` reads them."""
    llava(kind, seed=seed, **shape).save_pretrained(folder)
    processor(kind, grid=shape.get("grid", GRID)).save_pretrained(folder)
    return folder


def picture(seed=0, height=SIDE, width=None) -> Image.Image:
    """A picture of noise, by default a square. No two patches are alike."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width or height, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def video(seed=0, num_frames=3) -> list[Image.Image]:
    """Frames of noise."""
    return [picture(1000 * seed + frame) for frame in range(num_frames)]


def turn(question, answer):
    """A question and its answer, in LLaVA's form."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def save_mixed_data(folder: Path, kind: str) -> Path:
    """Write 12 examples with pictures of mixed sizes, two pictures, text alone, and videos if the
    model takes them.
    """
    sizes = [(SIDE, SIDE), (40, 90), (150, 60)]
    images = folder / "images"
    (images / "noise").mkdir(parents=True, exist_ok=True)

    records = []
    for index in range(12):
        record = {"id": f"row-{index}"}
        prefix = ""
        if index % 4 == 3 and kind in VIDEO:
            record["video"] = f"clips/{index}"
            prefix = "<video>\n"
            (images / record["video"]).mkdir(parents=True)
            for frame, image in enumerate(video(index, 4)):
                image.save(images / record["video"] / f"{frame}.png")
        elif index % 6 != 5:
            num_images = 2 if index % 4 == 0 else 1
            record["image"] = [f"noise/{index}-{number}.png" for number in range(num_images)]
            prefix = "<image>\n" * num_images
            for number, name in enumerate(record["image"]):
                picture(index + 100 * number, *sizes[(index + number) % 3]).save(images / name)

        record["conversations"] = turn(f"{prefix}what is in {index}?", f"noise {index % 7}")
        records.append(record)

    target = folder / "train.json"
    target.write_text(json.dumps(records))
    return target


def save_data(folder: Path, num_examples=24, *, text_only=2, held_out=False, seed=0) -> Path:
    """Write examples in LLaVA's format, with their pictures below `folder`/images: the path of the
    JSON file.
    """
    split = "test" if held_out else "train"
    images = folder / "images"
    (images / "noise").mkdir(parents=True, exist_ok=True)

    records = []
    for index in range(num_examples):
        record = {"id": f"row-{index}"}
        name = f"noise/{split}{index}.png"
        picture(seed * 1000 + index).save(images / name)
        if index >= text_only:
            record["image"] = name

        record["conversations"] = []
        num_turns = 1 if held_out else 1 + index % 3
        for number in range(num_turns):
            prefix = "<image>\n" if "image" in record and number == 0 else ""
            record["conversations"] += turn(f"{prefix}what is in picture {index}?", f"noise {index % 7}")
        if held_out:
            record["type"] = "open" if index % 2 else "yesno"
        records.append(record)

    target = folder / f"{split}.json"
    target.write_text(json.dumps(records))
    return target


def media_arguments(kind, processed):
    """Pick the model's arguments for the images, or the videos, from what a processor returned."""
    return MediaInputs.from_processed(kind, processed).arguments


def reduce(handle, pixel_values):
    """Reduce float[B, 3, height, width] with an attached reducer: its output before the projector."""
    return handle.reducer(handle.family.vision_tokens(handle.reducer, pixel_values))


def exact(model):
    """Make the norms of a model compute in its own precision. Those of transformers use float32 in
    float64 models too.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(hidden, module=module):
                variance = hidden.pow(2).mean(-1, keepdim=True)
                return module.weight * hidden * torch.rsqrt(variance + module.variance_epsilon)

            module.forward = forward
    return model
