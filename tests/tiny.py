"""Tiny models with random weights, whole on disk as a user's would be: built in well under a second, never downloaded."""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

GRID, PATCH, LAYERS = 4, 14, 4
SIDE = GRID * PATCH
TOWERS = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 64, "projection_dim": 16},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, "use_mask_token": False},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 64, "vision_use_head": False},
}
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]


def tokenizer():
    """Bytes, and the special tokens of all templates: 262 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )


def architecture(tower="clip", *, grid=GRID, layers=LAYERS, width=32):
    """LlavaConfig's arguments for a tower of `layers` layers on `grid` x `grid` patches."""
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": grid * PATCH,
        "patch_size": PATCH,
        **TOWERS[tower],
    }
    text = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(SPECIAL) + 256,
        "max_position_embeddings": 2048,
    }
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": SPECIAL.index("<image>"),
        "image_seq_length": grid * grid,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if tower == "siglip" else "default",
    }


def llava(tower="clip", *, seed=0, dtype=torch.float32, **shape):
    """A LLaVA with weights scaled up, so that attention is not near uniform and top-k is no tie."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(**architecture(tower, **shape))).eval()
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if "_proj.weight" in name:
                parameter.normal_(std=0.4)
        for name, parameter in model.model.vision_tower.named_parameters():
            if "patch_embedding" in name or "projection.weight" in name:
                parameter.normal_(std=0.1)
    return model.to(dtype)


def processor(tower="clip", *, grid=GRID):
    """The processor of `llava(tower, grid=grid)`."""
    side = grid * PATCH
    has_cls = tower != "siglip"
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default" if has_cls else "full",
        num_additional_image_tokens=int(has_cls),
    )


def save_llava(folder: Path, tower="clip", *, seed=0, **shape) -> Path:
    """Write model and processor to `folder`, as `from_pretrained` reads them."""
    llava(tower, seed=seed, **shape).save_pretrained(folder)
    processor(tower, grid=shape.get("grid", GRID)).save_pretrained(folder)
    return folder


def picture(seed=0, side=SIDE) -> Image.Image:
    """A noisy picture: no two patches alike."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def save_data(folder: Path, num_rows=24, *, text_only=2, held_out=False, seed=0) -> Path:
    """Write rows in LLaVA's format with their pictures below `folder`/images: the path of the JSON file."""
    rows = []
    for index in range(num_rows):
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
            row["conversations"] += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
        if held_out:
            row["type"] = "open" if index % 2 else "yesno"
        rows.append(row)
    target = folder / ("test.json" if held_out else "train.json")
    target.write_text(json.dumps(rows))
    return target
