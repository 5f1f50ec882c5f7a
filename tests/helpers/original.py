"""Tiny checkpoints in the layout of LLaVA's own code."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny

VOCABULARY = len(tiny.SPECIAL) + 256
"""Ids of the original vocabulary; `<image>` gets the next one."""

NAMES = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
"""Beginnings of names in transformers, and in LLaVA's code."""


def original_tensors(model, *, tower=False):
    """A model's tensors as LLaVA's code names them. It saves the tower too if that was tuned."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tower or not name.startswith("model.vision_tower."):
            for ours, theirs in NAMES.items():
                name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
            tensors[name] = tensor.clone()

    # Buffers that transformers 4.31 saved.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if tower:
        position_ids = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
        tensors[position_ids] = torch.arange(17)[None]
    return tensors


def save_weights(folder, tensors, form="bin", num_shards=2):
    """Write one file, or shards with an index."""
    stem, write = ("pytorch_model", torch.save) if form == "bin" else ("model", save_file)
    if num_shards == 1:
        write(tensors, folder / f"{stem}.{form}")
        return

    index = {}
    for shard in range(num_shards):
        name = f"{stem}-{shard + 1:05}-of-{num_shards:05}.{form}"
        own = dict(list(tensors.items())[shard::num_shards])
        write(own, folder / name)
        index |= dict.fromkeys(own, name)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def save_config(folder, model, **changes):
    """Write config.json. A change to "absent" leaves a key out."""
    text = model.config.text_config.to_dict()
    del text["rope_parameters"]
    config = text | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "rope_scaling": None,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "some/clip",
        "torch_dtype": "float16",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    config = {key: value for key, value in (config | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def save_tower(folder, model):
    model.model.vision_tower.save_pretrained(folder)
    tiny.processor().image_processor.save_pretrained(folder)


def save_tokenizer(folder):
    """Write the byte tokenizer without `<image>`."""
    backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str().replace("<image>", "<spare>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def save_original(folder, model, *, form="bin", num_shards=2, tower=False, **changes):
    """Write `model` as LLaVA's code would, and its tower beside it, as some/clip; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder, model, **changes)
    save_weights(folder, original_tensors(model, tower=tower), form, num_shards)
    save_tower(folder.parent / "some" / "clip", model)
    save_tokenizer(folder)
    return folder


def change_weights(folder, change, model=None, *, tower=False):
    """Write the weights again after `change(tensors)`; returns the folder."""
    tensors = original_tensors(model or tiny.llava(), tower=tower)
    change(tensors)
    save_weights(folder, tensors)
    return folder


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
