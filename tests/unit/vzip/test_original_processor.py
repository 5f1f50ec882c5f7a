"""Processors of LLaVA's own code: pictures, `<image>`, and the ids of SentencePiece."""

import json
import random
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig

import vzip
from tests.helpers import damage, tiny
from tests.helpers.errors import refused
from tests.helpers.original import VOCABULARY, change_config, save_original
from vzip.checkpoints.original import sentencepieces
from vzip.checkpoints.original.llava import load_model, load_processor, load_tokenizer
from vzip.media import image_aspect_ratio

# Pictures


@pytest.mark.parametrize(("ratio", "expected"), [("pad", "pad"), ("square", "square"), ("absent", "square")])
def test_pictures_are_prepared_as_config_json_says(tmp_path, ratio, expected):
    folder = save_original(tmp_path / "llava", tiny.llava(), image_aspect_ratio=ratio)
    assert image_aspect_ratio(load_processor(str(folder))) == expected


def test_a_tower_without_its_preprocessing_is_refused(original_folder, tmp_path):
    (tmp_path / "some" / "clip" / "preprocessor_config.json").unlink()
    refused(load_processor, str(original_folder), words=["some/clip", "preprocessor_config.json"])


def test_what_is_saved_in_the_layout_of_transformers_is_the_same(original_folder, tmp_path):
    processor = load_processor(str(original_folder))
    processor.save_pretrained(tmp_path / "saved")
    load_model(str(original_folder), dtype=torch.float32).save_pretrained(tmp_path / "saved")

    llava = vzip.families.families()["llava"]
    again = llava.load_processor(str(tmp_path / "saved"))
    question = {"images": Image.new("RGB", (80, 30), "red"), "text": "<image>abc", "return_tensors": "pt"}
    expected, inputs = processor(**question), again(**question)
    assert all(torch.equal(expected[key], inputs[key]) for key in ("input_ids", "pixel_values"))

    model = load_model(str(original_folder), dtype=torch.float32)
    saved = llava.load_model(str(tmp_path / "saved"), dtype=torch.float32)
    assert torch.equal(model(**expected).logits, saved(**expected).logits)


# `<image>`


def test_image_is_the_first_new_id(original_folder):
    tokenizer = load_tokenizer(str(original_folder))
    assert tokenizer.encode("a<image>b") == [*tokenizer.encode("a"), VOCABULARY, *tokenizer.encode("b")]
    assert tokenizer.decode([VOCABULARY], skip_special_tokens=True) == ""
    assert tokenizer.pad_token == "<unk>"

    # A padded vocabulary has it behind its padding.
    change_config(original_folder, vocab_size=VOCABULARY + 5)
    assert load_tokenizer(str(original_folder)).convert_tokens_to_ids("<image>") == VOCABULARY + 5


@pytest.mark.parametrize("size", [VOCABULARY - 1, VOCABULARY + 64, 9])
def test_a_tokenizer_of_another_size_is_refused(original_folder, size):
    change_config(original_folder, vocab_size=size)
    words = [f"<image> at {VOCABULARY}", f"vocab_size in config.json is {size}"]
    refused(load_tokenizer, str(original_folder), words=words)


def test_a_tokenizer_that_has_image_elsewhere_is_refused(original_folder):
    tiny.tokenizer().save_pretrained(original_folder)
    refused(load_tokenizer, str(original_folder), words=["<image> at 3", f"is {VOCABULARY}"])


def test_a_folder_without_a_tokenizer_is_refused(original_folder):
    for path in original_folder.glob("tokenizer*"):
        path.unlink()
    refused(load_tokenizer, str(original_folder), words=[str(original_folder), "tokenizer"])


# SentencePiece

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


@pytest.fixture
def pieces(original_folder, sentencepiece_folder):
    """A SentencePiece model, which is the checkpoint's tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    for path in [*original_folder.glob("tokenizer*"), *original_folder.glob("special_tokens*")]:
        path.unlink()
    shutil.copy(sentencepiece_folder / "tokenizer.model", original_folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(original_folder / "tokenizer.model"))
    change_config(original_folder, vocab_size=model.get_piece_size())
    return model


@pytest.mark.parametrize(
    "settings",
    [LLAMA, LLAMA | {"legacy": True}, {"tokenizer_class": "LlamaTokenizer"}, None],
    ids=["new", "legacy", "old", "none"],
)
@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_a_sentencepiece_model(original_folder, pieces, settings, model_type):
    change_config(original_folder, model_type=model_type)
    if settings:
        (original_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(original_folder))
    for text in ("A chat between a user and an assistant.", "USER: What's  this?\nÄpfel, 苹果 🍎"):
        assert tokenizer.encode(text) == [1, *pieces.encode(text)]

    image_id = pieces.get_piece_size()
    ids = tokenizer.encode("USER: <image>\nwhat?")
    assert ids.count(image_id) == 1 and ids[0] == 1
    assert tokenizer.decode(ids[ids.index(image_id) + 1 :]).strip() == "what?"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 2, image_id + 1)


def test_ids_are_those_of_sentencepiece_for_any_white_space(original_folder, pieces, tmp_path):
    (original_folder / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    tokenizer = load_tokenizer(str(original_folder))
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved", config=LlamaConfig())

    draw = random.Random(0)
    words = ["a", "cat", "What's", "indent\tfoo", "苹果", "🍎", "12345", "http://x.y/z", "...", "ASSISTANT:"]
    gaps = [" ", "  ", "   ", "\n", "\n  ", "\n\n", " " * 17]
    for _ in range(200):
        text = "".join(draw.choice(words) + draw.choice(gaps) for _ in range(12))
        assert tokenizer.encode(text) == saved.encode(text) == [1, *pieces.encode(text)], text


@pytest.mark.parametrize(
    "make_damage", [damage.cut, damage.empty, damage.write_html], ids=lambda function: function.__name__
)
def test_a_broken_sentencepiece_model_is_refused(original_folder, pieces, make_damage):
    make_damage(original_folder / "tokenizer.model")
    words = ["tokenizer.model", "not a SentencePiece model"]
    refused(load_tokenizer, str(original_folder), words=words)


@pytest.mark.parametrize("library", ["sentencepiece", "protobuf"])
def test_a_missing_library_is_named(original_folder, pieces, monkeypatch, library):
    monkeypatch.setattr(sentencepieces, f"is_{library}_available", lambda: False)
    words = ["sentencepiece and protobuf", "pip install 'vzip[llava]'"]
    refused(load_tokenizer, str(original_folder), words=words)
