"""Settings, and starting projectors, of LLaVA's own code."""

import pytest
import torch
from safetensors.torch import save_file

import vzip
from tests.helpers import damage, tiny
from tests.helpers.errors import refused
from tests.helpers.original import VOCABULARY
from vzip.checkpoints.original.renaming import text_config
from vzip.runs.meta import WEIGHTS
from vzip.runs.projector import load_weights

# Settings of the language model


def test_settings_of_the_language_model_are_taken_over():
    config = {
        "vocab_size": 32000,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
        "pad_token_id": 0,
        "torch_dtype": "float16",
        "mm_vision_tower": "x",
        "use_cache": False,
    }
    text = text_config(config)
    assert (text.vocab_size, text.rms_norm_eps) == (32064, 1e-5)
    assert (text.num_key_value_heads, text.pad_token_id) == (2, 0)
    assert text.rope_parameters == {"rope_theta": 5e4, "rope_type": "default"}
    assert text.dtype is None and not hasattr(text, "mm_vision_tower")

    scaled = text_config(config | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.rope_parameters["rope_type"] == "linear" and scaled.rope_parameters["factor"] == 2


@pytest.mark.parametrize(("size", "grown"), [(63, 64), (64, 128), (127, 128), (128, 192), (VOCABULARY, 320)])
def test_the_vocabulary_grows_to_the_next_multiple_of_64(size, grown):
    assert text_config({"vocab_size": size}).vocab_size == grown


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "32000"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 8, "hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_settings_that_llama_does_not_take_are_refused(config, word):
    refused(text_config, config, words=["config.json", word])


# Starting projectors


def projector_of(model):
    prefix = "model.multi_modal_projector."
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}


def save_projector(path, tensors, *, prefix="model."):
    """Write a projector under LLaVA's names, in the format of the path's suffix."""
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("model.multi_modal_projector.linear_1", f"{prefix}mm_projector.0")
        name = name.replace("model.multi_modal_projector.linear_2", f"{prefix}mm_projector.2")
        renamed[name] = value
    (torch.save if path.suffix == ".bin" else save_file)(renamed, path)
    return path


def load(path, model=None):
    model = model or tiny.llava()
    load_weights(vzip.families.family_of(model), path)
    return projector_of(model)


def assert_equal_tensors(tensors, expected):
    assert all(torch.equal(value, tensors[name]) for name, value in expected.items())


def test_a_starting_projector_is_read_in_every_form(tmp_path):
    expected = projector_of(tiny.llava(seed=5))
    save_file(expected, tmp_path / WEIGHTS)
    assert_equal_tensors(load(tmp_path / WEIGHTS), expected)
    for name, prefix in (
        ("mm_projector.bin", "model."),
        ("mm_projector.bin", ""),
        ("non_lora_trainables.bin", "base_model.model.model."),
        ("mm_projector.safetensors", "model."),
    ):
        assert_equal_tensors(load(save_projector(tmp_path / name, expected, prefix=prefix)), expected)


def test_a_starting_projector_is_cast_to_the_precision_of_the_model(tmp_path):
    half = {name: value.half() for name, value in projector_of(tiny.llava(seed=5)).items()}
    loaded = load(save_projector(tmp_path / "mm_projector.bin", half))
    assert_equal_tensors(loaded, {name: value.float() for name, value in half.items()})


WIDE = {"model.mm_projector.0.weight": torch.zeros(48, 64)}
EMBEDDING = {"model.embed_tokens.weight": torch.zeros(9, 48)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: dict.fromkeys(tensors, torch.zeros(0)),
            ["size 0", "LLaVA#665: saved under ZeRO-3 without gathering"],
        ),
        (lambda tensors: dict(list(tensors.items())[1:]), ["mm_projector.* has", "mlp2x_gelu"]),
        (lambda _: {"model.mm_projector.weight": torch.zeros(48, 32)}, ["['weight']", "not linear"]),
        (lambda tensors: tensors | EMBEDDING, ["more than mm_projector", "embed_tokens"]),
        (lambda tensors: tensors | WIDE, ["does not fit the model", "(48, 64)"]),
        (lambda _: {"lm_head.weight": torch.zeros(2)}, ["does not fit the model", "lm_head.weight"]),
    ],
    ids=["empty", "one less", "linear", "an embedding", "wide", "a head"],
)
def test_a_starting_projector_that_does_not_fit_is_refused(tmp_path, change, words):
    file = save_projector(tmp_path / "mm_projector.bin", projector_of(tiny.llava(seed=5)))
    torch.save(change(torch.load(file)), file)

    model = tiny.llava()
    refused(load, file, model, words=[str(file), *words])
    assert_equal_tensors(projector_of(model), projector_of(tiny.llava()))


def test_a_broken_starting_projector_is_refused(tmp_path):
    file = save_projector(tmp_path / "mm_projector.bin", projector_of(tiny.llava()))
    damage.cut(file)
    refused(load, file, words=[f"projector {file}", "can't be read"])
