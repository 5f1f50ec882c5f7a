"""Checkpoints of LLaVA's own code: the loaded model is the same bit for bit, or is refused with the
reason.
"""

import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.original import VOCABULARY, change_config, change_weights, save_original, save_tower
from vzip.checkpoints import shards
from vzip.checkpoints.original import llava as original
from vzip.checkpoints.original import towers

pytestmark = pytest.mark.slow

IMAGE_ID = tiny.SPECIAL.index("<image>")


def load(folder, dtype=torch.float32):
    return original.load_model(str(folder), dtype=dtype)


def load_processor(folder):
    return original.load_processor(str(folder))


def inputs_with(image_id, num_tokens):
    """Three prompts of 40 tokens with one picture each, whose placeholders have the id `image_id`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(tiny.SPECIAL), VOCABULARY, (3, 40), generator=generator)
    ids[:, 5 : 5 + num_tokens] = image_id
    pixels = torch.randn(3, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


@torch.no_grad()
def assert_same(loaded, model, num_tokens=16):
    """Logits of the old vocabulary are equal bit for bit, and a new id is never the most likely one."""
    expected = model(**inputs_with(IMAGE_ID, num_tokens)).logits
    logits = loaded(**inputs_with(VOCABULARY, num_tokens)).logits
    assert logits.shape[-1] == 64 * (VOCABULARY // 64 + 1)
    assert torch.equal(logits[..., :VOCABULARY], expected)
    assert (logits[..., VOCABULARY:].amax(-1) < expected.amax(-1)).all()


# The loaded model


@pytest.mark.parametrize("tower", [False, True], ids=["tower beside", "tower inside"])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_the_model_is_the_same(tmp_path, form, tower):
    model = tiny.llava()
    loaded = load(save_original(tmp_path / "llava", model, form=form, tower=tower))
    assert not loaded.training and loaded.config.image_token_id == VOCABULARY
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])

    # New rows are the mean of the others, and nothing depends on the files any more.
    new_rows = loaded.lm_head.weight[VOCABULARY:]
    torch.testing.assert_close(new_rows, model.lm_head.weight.mean(0).expand_as(new_rows))
    for path in (tmp_path / "llava").glob("pytorch_model*.bin"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(loaded, model)


def test_all_tokens_of_the_tower_and_another_layer(original_folder):
    settings = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -3, "model_type": "llava"}
    change_config(original_folder, **settings)
    model = tiny.llava()
    model.config.vision_feature_select_strategy = "full"
    model.config.vision_feature_layer = -3
    assert_same(load(original_folder), model, num_tokens=17)
    assert load_processor(original_folder).vision_feature_select_strategy == "full"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_requested_precision(tmp_path, dtype):
    # Not model.to(), which would round the rotary frequencies too.
    model = tiny.llava()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())

    def to_half(tensors):
        tensors.update({name: value.half() for name, value in tensors.items()})

    folder = save_original(tmp_path / "llava", model)
    loaded = load(change_weights(folder, to_half, model), dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    if dtype == torch.float32:
        assert_same(loaded, model)


def test_a_tied_head_is_the_embedding(tmp_path):
    model = tiny.llava()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    folder = save_original(tmp_path / "llava", model, tie_word_embeddings=True)
    loaded = load(change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"), model))
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert_same(loaded, model)


def test_generate_answers_as_the_model_does(original_folder):
    """Model and processor together, on a padded batch, against the same model with its own processor."""
    question = {
        "images": [tiny.picture(1), tiny.picture(2)],
        "text": ["<image>a", "bcd<image>"],
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
    }
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = tiny.llava().generate(**tiny.processor()(**question), **limits)

    loaded, processor = load(original_folder), load_processor(original_folder)
    inputs = processor(**question)
    assert processor.tokenizer.pad_token_id == 0
    assert (inputs["input_ids"] == VOCABULARY).sum(1).tolist() == [16, 16]
    output = loaded.generate(**inputs, **limits)
    assert torch.equal(output.masked_fill(output == VOCABULARY, IMAGE_ID), expected)

    handle = vzip.attach(loaded, dominant=4, contextual=2)
    inputs = handle.processor(processor)(images=tiny.picture(), text="<image>a", return_tensors="pt")
    assert (inputs["input_ids"] == VOCABULARY).sum() == 6
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= 7 + 3


# The tower


def test_the_tower_in_the_checkpoint_is_preferred(tmp_path):
    tuned = tiny.llava(seed=1)
    folder = save_original(tmp_path / "llava", tuned, tower=True)
    save_tower(tmp_path / "some" / "clip", tiny.llava(seed=0))
    (tmp_path / "some" / "clip" / "model.safetensors").write_bytes(b"never read")
    assert_same(load(folder), tuned)


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("some/clip", "llava/some/clip"),
        ("some/clip", "clip"),
        ("/gone/on/this/machine/clip", "clip"),
        ("clip", "llava/clip"),
    ],
)
def test_a_tower_is_found_by_its_name_in_the_checkpoint_or_beside_it(
    original_folder, tmp_path, name, location
):
    change_config(original_folder, mm_vision_tower=name)
    (tmp_path / location).parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "some" / "clip", tmp_path / location)
    assert towers.find_clip(str(original_folder), name)[0] == str((tmp_path / location).resolve())
    assert_same(load(original_folder), tiny.llava())


def test_a_tower_where_the_config_says_comes_first(original_folder, tmp_path):
    far = tmp_path / "far" / "clip"
    save_tower(far, tiny.llava(seed=1))
    assert towers.find_clip(str(original_folder), str(far))[0] == str(far)
    locations = towers.tower_locations("liuhaotian/llava-v1.5-7b", "openai/clip")
    assert [str(location) for location in locations] == ["openai/clip"]


def test_a_complete_clip_is_a_tower(original_folder, tmp_path):
    """openai/clip-vit-large-patch14-336 has text and vision, and the vision settings one level down."""
    model = tiny.llava()
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = model.config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    tower = {f"vision_model.{name}": value for name, value in model.model.vision_tower.state_dict().items()}
    assert tower.keys() <= clip.state_dict().keys()
    clip.load_state_dict(tower, strict=False)

    shutil.rmtree(tmp_path / "some" / "clip")
    clip.save_pretrained(tmp_path / "some" / "clip")
    (tmp_path / "some" / "clip" / "model.safetensors").unlink()
    torch.save(clip.state_dict(), tmp_path / "some" / "clip" / "pytorch_model.bin")
    assert_same(load(original_folder), model)


def test_a_missing_tower_is_refused(original_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(tmp_path / "some")
    for call in (load, load_processor):
        words = [str(original_folder), "mm_vision_tower 'some/clip'", "beside"]
        refused(call, original_folder, words=words)
    change_config(original_folder, mm_vision_tower="/gone/clip")
    refused(load, original_folder, words=["mm_vision_tower '/gone/clip'", "put its folder beside"])


def test_a_tower_that_does_not_fit_is_refused(original_folder, tmp_path):
    clip = tmp_path / "some" / "clip"
    save_tower(clip, tiny.llava(width=64))
    words = ["do not fit", "multi_modal_projector.linear_1.weight (48, 32), not (48, 64)"]
    refused(load, original_folder, words=words)

    tiny.llava("siglip").model.vision_tower.save_pretrained(clip)
    words = ["mm_vision_tower 'some/clip'", "'siglip_vision_model'", "CLIP"]
    refused(load, original_folder, words=words)


def test_a_tower_without_its_weights_is_refused(original_folder, tmp_path):
    weights = tmp_path / "some" / "clip" / "model.safetensors"
    tensors = {name: value.clone() for name, value in shards.read_tensors(weights).items()}
    (name,) = [name for name in tensors if name.endswith("post_layernorm.weight")]
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(load, original_folder, words=["mm_vision_tower", "lacks", "post_layernorm.weight"])
    weights.unlink()
    refused(load, original_folder, words=["weights of mm_vision_tower", "can't be loaded"])


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_aspect_ratio": "anyres"}, ["LLaVA-1.6", "llava-hf/llava-v1.6-*", "anyres"]),
        ({"image_aspect_ratio": "anyres_max_9"}, ["LLaVA-1.6", "llava-hf/llava-v1.6-*"]),
        ({"image_aspect_ratio": "highres"}, ["image_aspect_ratio is 'highres'", "'pad'", "'square'"]),
        ({"mm_projector_type": "linear"}, ["mm_projector_type is 'linear'", "'mlp2x_gelu'"]),
        ({"mm_projector_type": "mlp3x_gelu"}, ["mm_projector_type is 'mlp3x_gelu'", "'mlp2x_gelu'"]),
        ({"model_type": "llava_mpt"}, ["model_type is 'llava_mpt'", "'llava_llama'"]),
        ({"mm_vision_select_feature": "cls"}, ["mm_vision_select_feature is 'cls'", "'cls_patch'"]),
        ({"mm_vision_select_layer": [-2, -5]}, ["mm_vision_select_layer is [-2, -5]"]),
        ({"mm_use_im_start_end": True}, ["mm_use_im_start_end is True"]),
        ({"s2": True}, ["s2 is True"]),
    ],
    ids=str,
)
def test_a_setting_that_is_not_supported_is_refused(original_folder, changes, words):
    change_config(original_folder, **changes)
    for call in (load, load_processor):
        refused(call, original_folder, words=[str(original_folder), *words])


def test_a_missing_projector_type_means_linear(tmp_path):
    folder = save_original(tmp_path / "llava", tiny.llava(), mm_projector_type="absent")
    refused(load, folder, words=["mm_projector_type is 'linear'"])


def without(*parts):
    """A change that removes the tensors whose names hold one of the parts."""

    def change(tensors):
        for name in list(tensors):
            if any(part in name for part in parts):
                del tensors[name]

    return change


def with_tensor(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.norm.weight"), ["missing are", "model.language_model.norm.weight"]),
        (without("lm_head.weight"), ["missing are", "lm_head.weight"]),
        (without("model.layers"), ["missing are", "and 10 more"]),
        (with_tensor("model.adapter.weight", 2), ["not part of the model are", "model.adapter.weight"]),
        (with_tensor("model.layers.7.x", 2), ["not part of", "model.language_model.layers.7.x"]),
        (with_tensor("model.norm.weight", 2), ["another shape", "norm.weight (2,), not (48,)"]),
        (with_tensor("lm_head.weight", 99, 48), ["lm_head.weight has the shape (99, 48)", str(VOCABULARY)]),
        (with_tensor("model.embed_tokens.weight", 0), ["embed_tokens.weight has the shape (0,)"]),
        (with_tensor("model.image_newline", 48), ["LLaVA-1.6", "llava-hf/llava-v1.6-*"]),
        (with_tensor("model.mm_projector.0.weight", 0), ["LLaVA#665", "ZeRO-3"]),
        (with_tensor("model.mm_projector.4.weight", 48, 48), ["4.weight", "mlp2x_gelu"]),
        (without("model.mm_projector.2.bias"), ["mm_projector.* has", "2.bias", "mlp2x_gelu"]),
        (without("mm_projector"), ["there is no mm_projector", "mlp2x_gelu"]),
        (with_tensor("model.mm_projector.0.weight", 48, 9), ["linear_1.weight (48, 9), not (48, 32)"]),
    ],
)
def test_weights_that_are_not_exactly_the_models_are_refused(original_folder, change, words):
    refused(load, change_weights(original_folder, change), words=words)


@pytest.mark.parametrize("name", ["post_layernorm.weight", "encoder.layers.3.mlp.fc1.bias"])
def test_an_incomplete_tower_in_the_checkpoint_is_refused(original_folder, name):
    change_weights(original_folder, without(f"vision_model.{name}"), tower=True)
    refused(load, original_folder, words=["missing are", name])
