"""Tiny Mini-Gemini models, and their public checkpoints in the layout of MGM's own code."""

import json
import re

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from tests.helpers import tiny
from tests.helpers.original import save_weights
from vzip.models.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration

SIDE = 64
WIDTHS = [8, 12, 16, 20]

WORDS = 60
"""Ids of the public vocabulary. `<image>` gets the next one."""

GROWN = 64
"""Ids of the model's vocabulary: the next multiple of 64 that has room for `<image>`."""

TEXT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def config(**changes):
    arguments = tiny.architecture(layers=2) | {"image_token_index": WORDS}
    arguments["text_config"] = {"model_type": "llama", "vocab_size": GROWN, **TEXT}
    arguments["high_resolution_config"] = {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": WIDTHS,
        "image_size": SIDE,
    }
    return MiniGeminiConfig(**arguments | changes)


def build(dtype=torch.float32, seed=0):
    """A model whose every parameter matters: no layer scale near 0, no LayerNorm that is the identity."""
    torch.manual_seed(seed)
    model = MiniGeminiForConditionalGeneration(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        # The rows that a loader adds.
        for embedding in (model.model.language_model.embed_tokens.weight, model.lm_head.weight):
            embedding[WORDS:] = embedding[:WORDS].mean(0)
    return model.to(dtype)


def batch(dtype=torch.float32, seed=1):
    """Two examples with 16 placeholders each, in different places, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (2, 22), generator=generator)
    ids[0, 1:17] = WORDS
    ids[1, 3:19] = WORDS
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=dtype),
        "labels": ids.masked_fill(ids == WORDS, -100),
    }


def timm_names(tensors):
    """The high-resolution tower's tensors under timm's names."""
    names = {
        "embeddings.patch_embeddings": "stem.0",
        "embeddings.layernorm": "stem.1",
        "downsampling_layer": "downsample",
        "layers": "blocks",
        "dwconv": "conv_dw",
        "layernorm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
        "layer_scale_parameter": "gamma",
    }
    pattern = re.compile("|".join(re.escape(name) for name in names))
    renamed = {}
    for name, tensor in tensors.items():
        renamed[pattern.sub(lambda match: names[match[0]], name)] = tensor
    return renamed


# Public checkpoints


def public_tokenizer():
    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(WORDS - 3))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def public_weights(model, *, towers):
    """The model's tensors under MGM's names."""
    inner = model.model
    weights = {"lm_head.weight": model.lm_head.weight[:WORDS]}
    for name, tensor in inner.language_model.state_dict().items():
        weights[f"model.{name}"] = tensor[:WORDS] if name == "embed_tokens.weight" else tensor
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        for kind, tensor in getattr(inner.multi_modal_projector, ours).state_dict().items():
            weights[f"model.mm_projector.{theirs}.{kind}"] = tensor
    for ours, theirs in (("query", "query"), ("key", "aux"), ("value", "val")):
        for name, tensor in getattr(inner.mining, ours).state_dict().items():
            weights[f"model.vlm_uni_{theirs}_projector.{name}"] = tensor

    if towers:
        prefix = "model.vision_tower.vision_tower.vision_model."
        for name, tensor in inner.vision_tower.state_dict().items():
            weights[prefix + name] = tensor
        weights[prefix + "embeddings.position_ids"] = torch.arange(17)[None]
        for name, tensor in timm_names(inner.high_resolution_tower.state_dict()).items():
            weights[f"model.vision_tower_aux.vision_{name}"] = tensor

    # A buffer that older versions of transformers saved.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def save_towers(folder, model):
    """Write the weights of both towers: CLIP, and OpenCLIP with the parts that MGM does not use."""
    CLIPVisionModel.from_pretrained(
        None, config=model.config.vision_config, state_dict=model.model.vision_tower.state_dict()
    ).save_pretrained(folder / "clip")

    weights = {
        "visual.trunk.head.norm.weight": torch.ones(1),
        "visual.head.mlp.fc1.weight": torch.ones(1),
        "token_embedding.weight": torch.ones(1),
        "logit_scale": torch.ones(1),
    }
    for name, value in timm_names(model.model.high_resolution_tower.state_dict()).items():
        weights[f"visual.trunk.{name}"] = value
    (folder / "openclip").mkdir()
    torch.save(weights, folder / "openclip" / "open_clip_pytorch_model.bin")


def save_public(folder, model, *, towers=True, change=lambda weights: None, **settings):
    """Write a checkpoint as MGM does, its towers' folders beside it; returns the checkpoint's folder."""
    zoo = folder / "zoo"
    CLIPVisionConfig(**model.config.vision_config.to_dict()).save_pretrained(zoo / "clip")
    if not towers:
        save_towers(zoo, model)

    path = folder / "checkpoint"
    public_tokenizer().save_pretrained(path)
    config = {
        "model_type": "mini_gemini",
        "vocab_size": WORDS,
        **TEXT,
        "mm_vision_tower": str(zoo / "clip"),
        "mm_vision_tower_aux": str(zoo / "openclip"),
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "image_size_aux": SIDE,
        "image_aspect_ratio": "pad",
        "image_grid": 1,
    }
    (path / "config.json").write_text(json.dumps(config | settings))

    weights = public_weights(model, towers=towers)
    change(weights)
    if towers:
        save_file(weights, path / "model.safetensors")
    else:
        save_weights(path, weights)
    return str(path)
