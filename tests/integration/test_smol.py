"""The embedded default: real weights, prepared from package-index parts."""

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


@pytest.fixture(scope="module", autouse=True)
def _prepared():
    if not (SMOL / "prepared.json").is_file():
        pytest.skip("the embedded default is not prepared; run `make data`")


@pytest.fixture(scope="module")
def smol():
    model = LlavaForConditionalGeneration.from_pretrained(SMOL / "model", dtype=torch.bfloat16).eval()
    return model, AutoProcessor.from_pretrained(SMOL / "model")


def test_language_model_is_whole(smol):
    model, processor = smol
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_our_template_is_the_tokenizers(smol):
    _, processor = smol
    turns = [("<image>\nwhat shape is it?", "circle"), ("what colour?", "red")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is it?"}]},
        {"role": "assistant", "content": "circle"},
        {"role": "user", "content": "what colour?"},
        {"role": "assistant", "content": "red"},
    ]
    text = processor.apply_chat_template(messages)
    ids, labels = encode(chatml(SYSTEM), processor.tokenizer, turns)
    assert ids == processor.tokenizer.encode(text, add_special_tokens=False)
    kept = [label for label in labels if label >= 0]
    assert processor.tokenizer.decode(kept) == "circle<|im_end|>red<|im_end|>"


def rows_of(split):
    table = open_table(SMOL / "easy_vqa" / f"{split}.json")
    assert not table.bad_examples()
    return [table.conversation(position) for position in range(len(table))]


def test_full_model_answers(smol):
    model, processor = smol
    family = family_of(model)
    load_weights(family, ROOT / "data" / "smol" / "projector.safetensors")
    rows = [row for row in rows_of("test") if row.kind == "open"][:12]
    correct = 0
    for row in rows:
        messages = [{"role": "user", "content": row.turns[0][0]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        picture = open_picture(SMOL / "easy_vqa" / "images" / row.images[0])
        inputs = processor(images=picture, text=prompt, return_tensors="pt").to(torch.bfloat16)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        answer = processor.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        correct += answer.strip() == row.turns[0][1]
    assert correct >= 9


def test_prepared_data_splits_pictures():
    train, test = rows_of("train"), rows_of("test")
    assert len(train) == 4000 and len({row.images for row in test}) == 1000
    assert not {row.images for row in train} & {row.images for row in test}
    assert {row.kind for row in test} == {"open", "yesno"}


def test_preparing_again_does_nothing():
    before = (SMOL / "model" / "model.safetensors").stat().st_mtime_ns
    done = start(["make", "data"])
    assert done.returncode == 0 and "is prepared" in done.stdout
    assert (SMOL / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_short_run_leaves_the_prepared_model_alone(tmp_path):
    weights = SMOL / "model" / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    tune(
        [
            "model=smol",
            "optim.max_steps=2",
            "evaluate.questions=8",
            "track=none",
            f"runs={tmp_path}",
            "name=short",
        ]
    )
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    losses = [
        json.loads(line)["train/loss"]
        for line in (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2 and all(0 < loss < 5 for loss in losses)
