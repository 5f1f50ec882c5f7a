"""Checkpoints of LLaVA's own code: what is loaded is the same model bit for bit, or is refused with the reason."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
)

import vzip
from tests.helpers import tiny
from tests.helpers.pieces import NUM_PIECES
from tests.helpers.errors import refused
from tests.helpers.original import (
    change_config,
    change_weights,
    original_names,
    save_original,
    save_tower,
    save_weights,
)
from vzip.checkpoints import shards
from vzip.checkpoints.original import llava as original
from vzip.checkpoints.original import renaming, sentencepieces, towers
from vzip.runs.projector import WEIGHTS, load_weights

pytestmark = pytest.mark.integration

VOCABULARY = len(tiny.SPECIAL) + 256
IMAGE_ID = tiny.SPECIAL.index("<image>")


def load(folder, dtype=torch.float32):
    return original.load_model(str(folder), dtype=dtype)


@pytest.fixture
def folder(tmp_path):
    return save_original(tmp_path / "llava", tiny.llava())


def ids_of(batch=3, image=IMAGE_ID, tokens=16, length=40):
    """int[batch, length] with one picture each, and the pixels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(tiny.SPECIAL), VOCABULARY, (batch, length), generator=generator)
    ids[:, 5 : 5 + tokens] = image
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(batch, 3, tiny.SIDE, tiny.SIDE, generator=generator),
    }


@torch.no_grad()
def assert_same(loaded, model, tokens=16):
    """Logits of the old vocabulary are equal bit for bit, and no new id is ever the most likely one."""
    want = model(**ids_of(tokens=tokens)).logits
    got = loaded(**ids_of(image=VOCABULARY, tokens=tokens)).logits
    assert got.shape[-1] == 64 * (VOCABULARY // 64 + 1)
    assert torch.equal(got[..., :VOCABULARY], want)
    assert (got[..., VOCABULARY:].amax(-1) < want.amax(-1)).all()


@pytest.mark.parametrize("tower", [False, True], ids=["tower beside", "tower inside"])
@pytest.mark.parametrize(
    ("form", "num_shards"), [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 2)]
)
def test_the_model_is_the_same(tmp_path, form, num_shards, tower):
    model = tiny.llava()
    loaded = load(save_original(tmp_path / "llava", model, form=form, num_shards=num_shards, tower=tower))
    assert_same(loaded, model)
    assert not loaded.training and loaded.config.image_token_id == VOCABULARY
    assert not any(parameter.is_meta for parameter in [*loaded.parameters(), *loaded.buffers()])


def test_every_tensor_is_there_under_its_name(folder):
    loaded, model = load(folder), tiny.llava()
    want = dict(model.named_parameters())
    for name, value in loaded.named_parameters():
        rows = slice(VOCABULARY) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert torch.equal(value[rows], want.pop(name)), name
    assert want == {}
    rows = loaded.lm_head.weight[VOCABULARY:]
    torch.testing.assert_close(rows, model.lm_head.weight.mean(0).expand_as(rows))


def test_all_tokens_of_the_tower_and_another_layer(tmp_path):
    changes = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -3, "model_type": "llava"}
    folder = save_original(tmp_path / "llava", tiny.llava(), **changes)
    model = tiny.llava()
    model.config.vision_feature_select_strategy, model.config.vision_feature_layer = "full", -3
    assert_same(load(folder), model, tokens=17)
    assert original.load_processor(str(folder)).vision_feature_select_strategy == "full"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_one_asked_for(tmp_path, dtype):
    model = tiny.llava()
    with torch.no_grad():
        for parameter in model.parameters():  # not model.to(): that would round the rotary frequencies too
            parameter.copy_(parameter.half())
    folder = save_original(tmp_path / "llava", model)
    change_weights(
        folder, lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}), model
    )
    loaded = load(folder, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    if dtype == torch.float32:
        assert_same(loaded, model)


def test_settings_of_the_language_model_arrive(tmp_path):
    config = {
        "vocab_size": 32000,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
    }
    config |= {
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "torch_dtype": "float16",
        "mm_vision_tower": "x",
        "use_cache": False,
    }
    text = renaming.text_config(config)
    assert (text.vocab_size, text.rms_norm_eps, text.num_key_value_heads, text.pad_token_id) == (
        32064,
        1e-5,
        2,
        0,
    )
    assert text.rope_parameters == {"rope_theta": 5e4, "rope_type": "default"}
    assert text.dtype is None and not hasattr(text, "mm_vision_tower")
    scaled = renaming.text_config(config | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.rope_parameters["rope_type"] == "linear" and scaled.rope_parameters["factor"] == 2
    assert [renaming.text_config({"vocab_size": size}).vocab_size for size in (63, 64, 127, 128)] == [
        64,
        128,
        128,
        192,
    ]


@pytest.mark.parametrize("size", ["absent", None, "32000", 0])
def test_a_config_without_a_vocabulary_is_refused(folder, size):
    changes = {"vocab_size": size} if size != "absent" else {}
    refused(renaming.text_config, {"hidden_size": 8, **changes}, words=["config.json", "vocab_size"])


def test_a_setting_that_llama_does_not_take_is_refused():
    refused(
        renaming.text_config, {"vocab_size": 8, "hidden_size": "wide"}, words=["config.json", "hidden_size"]
    )


def test_a_tied_head_is_the_embedding(tmp_path):
    model = tiny.llava()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    folder = save_original(tmp_path / "llava", model, tie_word_embeddings=True)
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"), model)
    loaded = load(folder)
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert_same(loaded, model)


def test_generate_answers_as_the_model_does(folder):
    """Processor and model together, on a padded batch, against the same model with its own processor."""
    images = [tiny.picture(1), tiny.picture(2)]
    settings = {"images": images, "text": ["<image>a", "bcd<image>"], "padding": True, "return_tensors": "pt"}
    settings["padding_side"] = "left"
    limits = {"max_new_tokens": 8, "do_sample": False}
    want = tiny.llava().generate(**tiny.processor()(**settings), **limits, pad_token_id=0)
    loaded, processor = load(folder), original.load_processor(str(folder))
    inputs = processor(**settings)
    assert (inputs["input_ids"] == VOCABULARY).sum(1).tolist() == [16, 16]
    got = loaded.generate(**inputs, **limits, pad_token_id=processor.tokenizer.pad_token_id)
    assert torch.equal(got.masked_fill(got == VOCABULARY, IMAGE_ID), want)


def test_a_reduced_model_runs(folder):
    loaded, processor = load(folder), original.load_processor(str(folder))
    handle = vzip.attach(loaded, dominant=4, contextual=2)
    inputs = handle.processor(processor)(images=tiny.picture(), text="<image>a", return_tensors="pt")
    assert (inputs["input_ids"] == VOCABULARY).sum() == 6
    assert loaded.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= 7 + 3


def test_the_tower_in_the_checkpoint_wins(tmp_path):
    tuned, other = tiny.llava(seed=1), tiny.llava(seed=0)
    folder = save_original(tmp_path / "llava", tuned, tower=True)
    save_tower(tmp_path / "some" / "clip", other)
    assert_same(load(folder), tuned)
    (tmp_path / "some" / "clip" / "model.safetensors").unlink()  # it is not even read
    assert_same(load(folder), tuned)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("some/clip", "llava/some/clip"),
        ("some/clip", "clip"),
        ("/gone/on/this/machine/clip", "clip"),
        ("clip", "llava/clip"),
    ],
)
def test_a_tower_is_found_by_its_name_in_the_checkpoint_or_beside_it(tmp_path, name, place):
    folder = save_original(tmp_path / "llava", tiny.llava(), mm_vision_tower=name)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "some" / "clip", tmp_path / place)
    assert towers.find_clip(str(folder), name)[0] == str((tmp_path / place).resolve())
    assert_same(load(folder), tiny.llava())


def test_a_tower_where_the_config_says_comes_first(tmp_path):
    folder = save_original(tmp_path / "llava", tiny.llava())
    far = tmp_path / "far" / "clip"
    save_tower(far, tiny.llava(seed=1))
    assert towers.find_clip(str(folder), str(far))[0] == str(far)
    assert [str(place) for place in towers.tower_locations("liuhaotian/llava-v1.5-7b", "openai/clip")] == [
        "openai/clip"
    ]


def test_a_whole_clip_is_a_tower(tmp_path):
    """As openai/clip-vit-large-patch14-336 is: text and vision, the vision settings one level down."""
    model = tiny.llava()
    folder = save_original(tmp_path / "llava", model)
    vision = model.config.vision_config.to_dict()
    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    inner = {
        name.removeprefix("vision_model."): name
        for name in clip.state_dict()
        if name.startswith("vision_model.")
    }
    clip.load_state_dict(
        {inner[n]: value for n, value in model.model.vision_tower.state_dict().items()}, strict=False
    )
    shutil.rmtree(tmp_path / "some" / "clip")
    clip.save_pretrained(tmp_path / "some" / "clip")
    tensors = clip.state_dict()
    (tmp_path / "some" / "clip" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "some" / "clip" / "pytorch_model.bin")
    assert_same(load(folder), model)


def test_a_missing_tower_is_refused(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(folder.parent / "some")
    for call in (load, lambda path: original.load_processor(str(path))):
        refused(call, folder, words=[str(folder), "mm_vision_tower 'some/clip'", "beside"])
    change_config(folder, mm_vision_tower="/gone/clip")
    refused(load, folder, words=["mm_vision_tower '/gone/clip'", "put its folder beside"])


def test_a_tower_that_is_no_clip_is_refused(folder):
    tiny.llava("siglip").model.vision_tower.save_pretrained(folder.parent / "some" / "clip")
    refused(load, folder, words=["mm_vision_tower 'some/clip'", "'siglip_vision_model'", "CLIP"])


def test_a_tower_without_its_weights_is_refused(folder):
    weights = folder.parent / "some" / "clip" / "model.safetensors"
    tensors = {name: value.clone() for name, value in shards.read_tensors(weights).items()}
    tensors.pop(
        "post_layernorm.weight"
        if "post_layernorm.weight" in tensors
        else "vision_model.post_layernorm.weight"
    )
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(load, folder, words=["mm_vision_tower", "lacks", "post_layernorm.weight"])
    weights.unlink()
    refused(load, folder, words=["weights of mm_vision_tower", "can't be loaded"])


def test_a_tower_of_another_width_is_refused(folder):
    save_tower(folder.parent / "some" / "clip", tiny.llava(width=64))
    refused(
        load, folder, words=["do not fit", "multi_modal_projector.linear_1.weight (48, 32), not (48, 64)"]
    )


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
def test_what_the_model_would_not_do_is_refused(folder, changes, words):
    change_config(folder, **changes)
    for call in (load, lambda path: original.load_processor(str(path))):
        refused(call, folder, words=[str(folder), *words])


def test_an_absent_projector_type_is_linear(tmp_path):
    folder = save_original(tmp_path / "llava", tiny.llava(), mm_projector_type="absent")
    refused(load, folder, words=["mm_projector_type is 'linear'"])


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), ["missing are", "model.language_model.norm.weight"]),
        (lambda t: t.pop("lm_head.weight"), ["missing are", "lm_head.weight"]),
        (
            lambda t: t.update({"model.adapter.weight": torch.zeros(2)}),
            ["not part of the model are", "model.adapter.weight"],
        ),
        (
            lambda t: t.update({"model.layers.7.x": torch.zeros(2)}),
            ["not part of", "model.language_model.layers.7.x"],
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(2)}),
            ["another shape", "norm.weight (2,), not (48,)"],
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(99, 48)}),
            ["lm_head.weight has the shape (99, 48)", str(VOCABULARY)],
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(0)}),
            ["embed_tokens.weight has the shape (0,)"],
        ),
        (
            lambda t: t.update({"model.image_newline": torch.zeros(48)}),
            ["LLaVA-1.6", "llava-hf/llava-v1.6-*"],
        ),
        (lambda t: t.update({"model.mm_projector.0.weight": torch.zeros(0)}), ["LLaVA#665", "ZeRO-3"]),
        (
            lambda t: t.update({"model.mm_projector.4.weight": torch.zeros(48, 48)}),
            ["4.weight", "mlp2x_gelu"],
        ),
        (lambda t: t.pop("model.mm_projector.2.bias"), ["mm_projector.* has", "2.bias", "mlp2x_gelu"]),
        (
            lambda t: t.update({"model.mm_projector.0.weight": torch.zeros(48, 9)}),
            ["linear_1.weight (48, 9), not (48, 32)"],
        ),
    ],
)
def test_weights_that_are_not_exactly_the_model_are_refused(folder, change, words):
    refused(load, change_weights(folder, change), words=[*words])


def test_a_checkpoint_without_a_projector_is_refused(folder):
    def drop(tensors):
        for name in [name for name in tensors if "mm_projector" in name]:
            del tensors[name]

    refused(load, change_weights(folder, drop), words=[str(folder), "there is no mm_projector", "mlp2x_gelu"])


@pytest.mark.parametrize("name", ["post_layernorm.weight", "encoder.layers.3.mlp.fc1.bias"])
def test_a_tower_in_the_checkpoint_that_is_not_whole_is_refused(folder, name):
    change_weights(
        folder, lambda t: t.pop(f"model.vision_tower.vision_tower.vision_model.{name}"), tower=True
    )
    refused(load, folder, words=["missing are", name])


def test_long_lists_of_names_are_cut(folder):
    def drop(tensors):
        for name in [name for name in tensors if "model.layers" in name]:
            del tensors[name]

    refused(load, change_weights(folder, drop), words=["missing are", "and 10 more"])


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_missing_shard_is_refused(tmp_path, form):
    folder = save_original(tmp_path / "llava", tiny.llava(), form=form, num_shards=3)
    shard = next(folder.glob("*-00002-of-00003.*"))
    shard.unlink()
    refused(load, folder, words=[str(folder), "lacks", shard.name])


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def fill(path):
    path.write_bytes(b"<html>not found</html>" * 20)


def link(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def nest(path):
    torch.save({"model": {"x": torch.zeros(1)}}, path)


def number(path):
    torch.save({0: torch.zeros(1)}, path)


def bare(path):
    torch.save(torch.zeros(1), path)


@pytest.mark.parametrize(
    "damage", [cut, empty, fill, link, nest, number, bare], ids=lambda damage: damage.__name__
)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_broken_shard_is_refused(tmp_path, form, damage):
    folder = save_original(tmp_path / "llava", tiny.llava(), form=form)
    shard = next(folder.glob("*-00002-of-00002.*"))
    damage(shard)
    refused(load, folder, words=[str(shard), "can't be read"])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a":'])
def test_a_broken_index_is_refused(folder, content):
    (folder / "pytorch_model.bin.index.json").write_text(content)
    refused(load, folder, words=["pytorch_model.bin.index.json", "no index of shards"])


def test_a_folder_without_weights_is_refused_with_the_way_out(folder):
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    refused(
        load,
        folder,
        words=[str(folder), "no weights", "model.safetensors", "pytorch_model.bin", "merge_lora_weights"],
    )


def test_what_is_not_there_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path in (tmp_path, tmp_path / "gone"):
        for call in (shards.read_config, original.load_tokenizer, original.load_processor, load):
            with pytest.raises(OSError):
                call(str(path))
    with pytest.raises(OSError):
        shards.read_weights(str(tmp_path / "gone"))


def test_safetensors_are_preferred(tmp_path):
    folder = save_original(tmp_path / "llava", tiny.llava(), form="safetensors")
    for shard in (1, 2):
        fill(folder / f"pytorch_model-0000{shard}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert_same(load(folder), tiny.llava())


@pytest.mark.parametrize(("form", "asked"), [("safetensors", 1), ("bin", 2)])
def test_of_a_hub_id_only_the_preferred_format_is_fetched(folder, monkeypatch, form, asked):
    patterns = []

    def download(path, *, allow_patterns):
        assert path == "liuhaotian/tiny"
        patterns.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(shards, "snapshot_download", download)
    if form == "safetensors":
        save_weights(folder, original_names(tiny.llava()), form)
    tensors = shards.read_weights("liuhaotian/tiny")
    assert tensors.keys() == original_names(tiny.llava()).keys()
    assert (
        patterns == [["model*.safetensors", "*.index.json"], ["pytorch_model*.bin", "*.index.json"]][:asked]
    )


def test_a_file_in_the_format_before_pytorch_1_6_is_read(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(shards.read_tensors(tmp_path / "old.bin")["a"], tensors["a"])


def test_the_model_does_not_hang_on_the_files(folder):
    loaded = load(folder)
    for path in folder.glob("pytorch_model*.bin"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(loaded, tiny.llava())


class Trap:
    """A pickle that touches a file when opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(folder, zipped):
    sprung = folder.parent / "sprung"
    shard = folder / "pytorch_model-00002-of-00002.bin"
    torch.save({"lm_head.weight": Trap(sprung)}, shard, _use_new_zipfile_serialization=zipped)
    refused(load, folder, words=[str(shard), "can't be read", "run as code"])
    projector = folder / "mm_projector.bin"
    shutil.copy(shard, projector)
    refused(
        load_weights,
        vzip.families.family_of(tiny.llava()),
        projector,
        words=[str(projector), "can't be read"],
    )
    assert not sprung.exists()


def projector_of(model):
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith("model.multi_modal_projector.")
    }


def projector_file(path, tensors, *, prefix="model.", ours=False):
    """A starting projector, ours or LLaVA's, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not ours:
        tensors = {name: tensors[name] for name in tensors}
        for new, old in (("linear_1", "mm_projector.0"), ("linear_2", "mm_projector.2")):
            tensors = {
                n.replace(f"model.multi_modal_projector.{new}", prefix + old): v for n, v in tensors.items()
            }
    torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (WEIGHTS, {"ours": True}),
        ("mm_projector.bin", {}),
        ("mm_projector.bin", {"prefix": ""}),
        ("non_lora_trainables.bin", {"prefix": "base_model.model.model."}),
        ("mm_projector.safetensors", {}),
    ],
)
def test_a_starting_projector_is_taken_in_every_form(tmp_path, name, settings):
    want = projector_of(tiny.llava(seed=5))
    file = projector_file(tmp_path / name, want, **settings)
    model = tiny.llava()
    load_weights(vzip.families.family_of(model), file)
    assert all(torch.equal(value, want[name]) for name, value in projector_of(model).items())


def test_a_starting_projector_takes_the_precision_of_the_model(tmp_path):
    want = {name: value.half() for name, value in projector_of(tiny.llava(seed=5)).items()}
    model = tiny.llava()
    load_weights(vzip.families.family_of(model), projector_file(tmp_path / "mm_projector.bin", want))
    assert all(torch.equal(value, want[name].float()) for name, value in projector_of(model).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update(dict.fromkeys(t, torch.zeros(0))),
            ["size 0", "LLaVA#665: saved under ZeRO-3 without gathering"],
        ),
        (lambda t: t.pop("model.mm_projector.2.weight"), ["mm_projector.* has", "mlp2x_gelu"]),
        (
            lambda t: [t.clear(), t.update({"model.mm_projector.weight": torch.zeros(48, 32)})],
            ["['weight']", "not linear"],
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(9, 48)}),
            ["more than mm_projector", "embed_tokens"],
        ),
        (
            lambda t: t.update({"model.mm_projector.0.weight": torch.zeros(48, 64)}),
            ["does not fit the model", "(48, 64)"],
        ),
        (
            lambda t: [t.clear(), t.update({"lm_head.weight": torch.zeros(2)})],
            ["does not fit the model", "lm_head.weight"],
        ),
    ],
)
def test_a_starting_projector_that_does_not_fit_is_refused(tmp_path, change, words):
    file = projector_file(tmp_path / "mm_projector.bin", projector_of(tiny.llava(seed=5)))
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)
    model, before = tiny.llava(), projector_of(tiny.llava())
    refused(load_weights, vzip.families.family_of(model), file, words=[str(file), *words])
    assert all(torch.equal(value, before[name]) for name, value in projector_of(model).items())


@pytest.mark.parametrize(
    "damage", [cut, empty, fill, link, nest, number, bare], ids=lambda damage: damage.__name__
)
def test_a_broken_starting_projector_is_refused(tmp_path, damage):
    file = projector_file(tmp_path / "mm_projector.bin", projector_of(tiny.llava()))
    damage(file)
    refused(
        load_weights,
        vzip.families.family_of(tiny.llava()),
        file,
        words=[f"projector {file}", "can't be read"],
    )


def expand_to_square(picture, colour):
    """As LLaVA pads (`llava/mm_utils.py`, `expand2square`), with PIL."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@pytest.mark.parametrize("size", [(90, 41), (33, 70), (64, 64)], ids=str)
@pytest.mark.parametrize("ratio", ["pad", "square", "absent"])
def test_pictures_are_prepared_as_llava_does(tmp_path, size, ratio):
    folder = save_original(tmp_path / "llava", tiny.llava(), image_aspect_ratio=ratio)
    clip = CLIPImageProcessorPil.from_pretrained(tmp_path / "some" / "clip")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    padded = (
        expand_to_square(picture, tuple(int(255 * value) for value in clip.image_mean))
        if ratio == "pad"
        else picture
    )
    got = original.load_processor(str(folder)).image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(got, clip(padded, return_tensors="pt")["pixel_values"])


def test_a_tower_without_its_preprocessing_is_refused(folder):
    (folder.parent / "some" / "clip" / "preprocessor_config.json").unlink()
    refused(original.load_processor, str(folder), words=["some/clip", "preprocessor_config.json"])


def test_a_saved_processor_comes_back(folder, tmp_path):
    """As a user would who saves the model in the layout of transformers."""
    processor = original.load_processor(str(folder))
    load(folder).save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    llava = vzip.families.families()["llava"]
    again = llava.load_processor(str(tmp_path / "saved"))
    question = {"images": Image.new("RGB", (80, 30), "red"), "text": "<image>abc", "return_tensors": "pt"}
    want, got = processor(**question), again(**question)
    assert all(torch.equal(want[key], got[key]) for key in ("input_ids", "pixel_values"))
    assert_same(llava.load_model(str(tmp_path / "saved"), dtype=torch.float32), tiny.llava())


def test_image_is_the_first_new_id(folder):
    tokenizer = original.load_tokenizer(str(folder))
    assert tokenizer.encode("a<image>b") == [*tokenizer.encode("a"), VOCABULARY, *tokenizer.encode("b")]
    assert tokenizer.decode([VOCABULARY], skip_special_tokens=True) == ""
    assert tokenizer.pad_token == "<unk>"


def test_a_padded_vocabulary_has_image_after_its_padding(folder):
    change_config(folder, vocab_size=VOCABULARY + 5)
    tokenizer = original.load_tokenizer(str(folder))
    assert tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY + 5


@pytest.mark.parametrize(
    ("size", "at"), [(VOCABULARY - 1, VOCABULARY), (VOCABULARY + 64, VOCABULARY), (9, VOCABULARY)]
)
def test_a_tokenizer_of_another_size_is_refused(folder, size, at):
    change_config(folder, vocab_size=size)
    refused(
        original.load_tokenizer,
        str(folder),
        words=[f"<image> at {at}", f"vocab_size in config.json is {size}"],
    )


def test_a_tokenizer_that_has_image_elsewhere_is_refused(folder):
    tiny.tokenizer().save_pretrained(folder)
    refused(original.load_tokenizer, str(folder), words=["<image> at 3", f"is {VOCABULARY}"])


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(original.load_tokenizer, str(folder), words=[str(folder), "tokenizer"])


LLAMA = {
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 2048,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}


def sentencepiece_tokenizer(folder, sentencepiece_folder, settings=LLAMA, **changes):
    """(the tokenizer as loaded, the SentencePiece model itself)"""
    sentencepiece = pytest.importorskip("sentencepiece")
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()
    shutil.copy(sentencepiece_folder / "tokenizer.model", folder)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(folder, vocab_size=NUM_PIECES, **changes)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return original.load_tokenizer(str(folder)), pieces


@pytest.mark.parametrize(
    "settings",
    [LLAMA, LLAMA | {"legacy": True}, {"tokenizer_class": "LlamaTokenizer"}, None],
    ids=["new", "legacy", "old", "none"],
)
@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_a_real_sentencepiece_model(folder, sentencepiece_folder, settings, kind):
    tokenizer, pieces = sentencepiece_tokenizer(folder, sentencepiece_folder, settings, model_type=kind)
    for text in (
        "A chat between a user and an assistant.",
        "USER: What's  this?\nÄpfel, 苹果 🍎",
        "two  spaces",
    ):
        assert tokenizer.encode(text) == [1, *pieces.encode(text)]
    ids = tokenizer.encode("USER: <image>\nwhat?")
    assert (
        ids.count(NUM_PIECES) == 1
        and ids[0] == 1
        and tokenizer.decode(ids[ids.index(NUM_PIECES) + 1 :]).strip() == "what?"
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 2, NUM_PIECES + 1)


def test_ids_are_those_of_sentencepiece_for_any_white_space(folder, sentencepiece_folder, tmp_path):
    tokenizer, pieces = sentencepiece_tokenizer(folder, sentencepiece_folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved", config=LlamaConfig())
    choose = random.Random(0)
    words = [
        "a",
        "the",
        "cat",
        "What's",
        "indent\tfoo",
        "苹果",
        "🍎",
        "12345",
        "http://x.y/z",
        "...",
        "ASSISTANT:",
    ]
    gaps = [" ", "  ", "   ", "\n", "\n  ", "\n\n", " " * 17]
    for _ in range(200):
        text = "".join(choose.choice(words) + choose.choice(gaps) for _ in range(12))
        assert tokenizer.encode(text) == saved.encode(text) == [1, *pieces.encode(text)], text


@pytest.mark.parametrize("damage", [cut, empty, fill], ids=lambda damage: damage.__name__)
def test_a_broken_tokenizer_is_refused(folder, sentencepiece_folder, damage):
    sentencepiece_tokenizer(folder, sentencepiece_folder)
    damage(folder / "tokenizer.model")
    refused(original.load_tokenizer, str(folder), words=["tokenizer.model", "not a SentencePiece model"])


@pytest.mark.parametrize("library", ["sentencepiece", "protobuf"])
def test_a_missing_library_is_named(folder, sentencepiece_folder, monkeypatch, library):
    sentencepiece_tokenizer(folder, sentencepiece_folder)
    monkeypatch.setattr(sentencepieces, f"is_{library}_available", lambda: False)
    refused(original.load_tokenizer, str(folder), words=["pip install sentencepiece protobuf"])
