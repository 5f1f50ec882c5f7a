"""The embedded default: its model, its data, and a short run."""

import hashlib
import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data.examples.table import open_table
from data.paths import data_dir
from tests.conftest import ROOT
from tests.helpers.commands import start, tune
from vzip.families import family_of
from vzip.pictures import open_picture
from vzip.runs.projector import load_weights
from vzip.templates.encode import chatml, encode

pytestmark = pytest.mark.integration

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOL = data_dir() / "smol"
WEIGHTS = SMOL / "model" / "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _prepared():
    if not (SMOL / "prepared.json").is_file():
        pytest.skip("the embedded default is not prepared; run `make data`")


@pytest.fixture(scope="module")
def smol():
    model = LlavaForConditionalGeneration.from_pretrained(SMOL / "model", dtype=torch.bfloat16).eval()
    return model, AutoProcessor.from_pretrained(SMOL / "model")


def conversations_of(split):
    table = open_table(SMOL / "easy_vqa" / f"{split}.json")
    assert not table.bad_examples()
    return [table.conversation(position) for position in range(len(table))]


def answer(model, processor, question, picture=None, *, num_tokens):
    """Ask the model one question, as plain transformers does."""
    messages = [{"role": "user", "content": question}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    if picture is None:
        inputs = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = processor(images=picture, text=prompt, return_tensors="pt").to(torch.bfloat16)

    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip()


def test_the_language_model_knows_what_it_knew(smol):
    assert "Paris" in answer(*smol, "What is the capital of France?", num_tokens=12)


def test_our_template_is_that_of_the_tokenizer(smol):
    _, processor = smol
    turns = [("<image>\nwhat shape is it?", "circle"), ("what colour?", "red")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is it?"}]},
        {"role": "assistant", "content": "circle"},
        {"role": "user", "content": "what colour?"},
        {"role": "assistant", "content": "red"},
    ]

    ids, labels = encode(chatml(SYSTEM), processor.tokenizer, turns)

    text = processor.apply_chat_template(messages)
    assert ids == processor.tokenizer.encode(text, add_special_tokens=False)
    label_ids = [label for label in labels if label >= 0]
    assert processor.tokenizer.decode(label_ids) == "circle<|im_end|>red<|im_end|>"


def test_the_full_model_answers_easy_vqa(smol):
    model, processor = smol
    load_weights(family_of(model), ROOT / "data" / "smol" / "projector.safetensors")
    open_questions = [each for each in conversations_of("test") if each.kind == "open"][:12]

    num_correct = 0
    for conversation in open_questions:
        ((question, expected),) = conversation.turns
        picture = open_picture(SMOL / "easy_vqa" / "images" / conversation.images[0])
        num_correct += answer(model, processor, question, picture, num_tokens=5) == expected
    assert num_correct >= 9


def test_training_and_held_out_pictures_differ():
    training, held_out = conversations_of("train"), conversations_of("test")
    training_images = {conversation.images for conversation in training}
    held_out_images = {conversation.images for conversation in held_out}

    assert len(training) == len(training_images) == 4000 and len(held_out_images) == 1000
    assert not training_images & held_out_images
    assert {conversation.kind for conversation in held_out} == {"open", "yesno"}


def test_preparing_again_does_nothing():
    before = WEIGHTS.stat().st_mtime_ns
    done = start(["make", "data"])
    assert done.returncode == 0 and "is prepared" in done.stdout
    assert WEIGHTS.stat().st_mtime_ns == before


def test_a_short_run_leaves_the_prepared_model_alone(tmp_path):
    before = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    settings = ["model=smol", "optim.max_steps=2", "evaluate.questions=8", "track=none"]
    tune([*settings, f"runs={tmp_path}", "name=short"])

    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == before
    lines = (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines]
    assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)
