"""Qwen-VL's prompts, token by token against the text that the models' own chat template writes."""

import pytest

from tests.helpers import tiny
from vzip.templates import qwen_vl
from vzip.templates.encode import IGNORED, encode
from vzip.templates.jinja import chat_template

VISION = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
TOKENIZER = tiny.tokenizer((*tiny.SPECIAL, *VISION))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

TURNS = [("<image>\nWhat is it?", "A cat."), ("And why?", "It is small.")]
WRITTEN = (
    f"<|im_start|>user\n{IMAGE}What is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nAnd why?<|im_end|>\n<|im_start|>assistant\nIt is small.<|im_end|>\n"
)


@pytest.mark.parametrize(
    ("template", "system"),
    [(qwen_vl(), SYSTEM), (qwen_vl(""), "")],
    ids=["2.5", "3, without a system prompt"],
)
def test_ids_are_those_of_the_models_own_template(template, system):
    ids, labels = encode(template, TOKENIZER, TURNS)
    assert ids == TOKENIZER(system + WRITTEN, add_special_tokens=False)["input_ids"]
    answers = [TOKENIZER(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"] for _, answer in TURNS]
    assert [label for label in labels if label != IGNORED] == answers[0] + answers[1]


def test_several_pictures_and_a_video_stand_between_their_tokens():
    ids, _ = encode(qwen_vl(""), TOKENIZER, [("<image><image>both? <video>", None)])
    text = f"<|im_start|>user\n{IMAGE}{IMAGE}{VIDEO}both?<|im_end|>\n<|im_start|>assistant\n"
    assert ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_spelled_tokens_of_a_picture_are_text():
    ids, _ = encode(qwen_vl(""), TOKENIZER, [("<image>see <|image_pad|>", None)])
    assert ids.count(TOKENIZER.convert_tokens_to_ids("<|image_pad|>")) == 1


def test_the_jinja_template_writes_the_same():
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "And why?"},
        {"role": "assistant", "content": "It is small."},
    ]
    TOKENIZER.chat_template = chat_template(qwen_vl(), TOKENIZER)
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == SYSTEM + WRITTEN
