"""The efficiency report: what is measured is what the model computes, and the table has every row."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from scripts import efficiency
from scripts.efficiency import EfficiencySetting, PrefillQuestion, made_up_questions, paper_flops
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import attached, save_run, tune
from vzip import Comparison
from vzip.families import family_of
from vzip.templates.encode import chatml
from vzip.templates.jinja import chat_template

LABELS = (
    "visual tokens",
    "prefill, language model alone",
    "time to first token, from the pixels",
    "each token after it",
    "all questions",
    "3 questions, 2 new tokens each",
    "KV cache after prefill",
    "weights, MiB",
    "peak memory above the weights",
    "weights and peak memory",
)
KV_BYTES_OF_A_TOKEN = 2 * 2 * 2 * 12 * 4
"""Layers, keys and values, heads, width, float32."""


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["efficiency.py", *map(str, arguments)])
    efficiency.main.__wrapped__()
    return capsys.readouterr().out


def test_a_run_is_compared_with_itself_and_with_another_model(run, tmp_path, monkeypatch, capsys):
    other, figures = tiny.save_llava(tmp_path / "small", "siglip", seed=4), tmp_path / "new" / "figures.json"
    given = (
        "--questions",
        3,
        "--new-tokens",
        2,
        "--rounds",
        2,
        "--batch",
        2,
        "--against",
        other,
        "--json",
        figures,
    )
    printed = command(monkeypatch, capsys, run, *given)
    assert all(label in printed for label in LABELS) and "noise" in printed
    found = json.loads(figures.read_text())
    assert list(found["rows"]) == ["full", "tuned", "full of small"] and found["made_up_questions"]
    assert [row["num_visual_tokens"] for row in found["rows"].values()] == [16, 6, 16]
    for name, row in found["rows"].items():
        element = 2 if "small" in name else 4  # a model that is no run's is loaded in bfloat16
        tokens = row["num_visual_tokens"] + row["num_text_tokens"]
        assert row["kv_bytes"] == 2 * tokens * KV_BYTES_OF_A_TOKEN * element // 4
        assert all(len(row[part]["seconds"]) == 2 for part in ("language", "whole", "token", "questions"))
        assert row["weight_bytes"] > 100_000 and row["total_bytes"] == row["weight_bytes"] + row["peak_bytes"]
    full, tuned, small = found["rows"].values()
    assert (
        full["num_text_tokens"] == tuned["num_text_tokens"]
        and full["language_flops"] > tuned["language_flops"]
    )
    for base, formula in (
        (full, "language_flops"),
        (full, "whole_flops"),
        (full, "paper_flops"),
        (small, "paper_flops"),
    ):
        assert f"{base[formula] / tuned[formula]:.2f}" in printed
    ratios = [a / b for a, b in zip(full["whole"]["seconds"], tuned["whole"]["seconds"], strict=True)]
    middle = full["whole"]["median_s"] / tuned["whole"]["median_s"]
    assert f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" in printed
    assert f"{16 / 6:.2f}" in printed


def test_the_papers_formula():
    vicuna = SimpleNamespace(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    assert paper_flops(vicuna, 640) == 32 * (4 * 640 * 4096**2 + 2 * 640**2 * 4096 + 2 * 640 * 4096 * 11008)


def test_a_run_whose_questions_have_no_picture_is_asked_about_noise(run, tmp_path, monkeypatch, capsys):
    rows = [
        {"id": "1", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]}
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "data"))
    cfg = {
        "data": {"held_out": str(tmp_path / "questions.json"), "image_folder": str(tmp_path)},
        "evaluate": {"questions": 8},
    }
    (run / "config.yaml").write_text(json.dumps(cfg))
    (run / "result.json").write_text("{}")
    printed = command(monkeypatch, capsys, run, "--questions", 1, "--new-tokens", 1, "--rounds", 1)
    assert (
        "questions about noise" in printed
        and json.loads((run / "efficiency.json").read_text())["made_up_questions"]
    )


@pytest.mark.parametrize("kind", ["next", "mini-gemini", "video", "onevision"])
def test_every_family_is_measured(kind, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "figures.json"
    source = tiny.save_llava(tmp_path / "model", kind)
    given = (
        "--budget",
        20 if kind == "next" else 4,
        "--questions",
        1,
        "--new-tokens",
        1,
        "--rounds",
        1,
        "--json",
        figures,
    )
    command(monkeypatch, capsys, source, *given)
    full, free = json.loads(figures.read_text())["rows"].values()
    assert full["num_visual_tokens"] > free["num_visual_tokens"] and full["whole_flops"] > free["whole_flops"]
    assert "Identity" in full["reducer"] and "VisionZip" in free["reducer"]


@torch.no_grad()
def test_what_is_timed_is_what_the_row_answers(run):
    comparison = Comparison.open(run, device="cpu")
    questions = [
        PrefillQuestion(text, tiny.picture(seed)) for seed, text in enumerate(("a?", "what is it?", "why?"))
    ]
    for name in ("full", "tuned"):
        row = EfficiencySetting(comparison, name, budget=None)
        answers = row.answer(questions, batch=2, new_tokens=4)
        assert answers == row.answer(questions, batch=1, new_tokens=4)  # padding changes nothing
        case = row.prefill(questions[1], batch=2)
        with comparison.row(name) as (model, processor):
            inputs = processor(
                text=["<image>\nwhat is it?"] * 2, images=[tiny.picture(1)] * 2, return_tensors="pt"
            )
            assert all(torch.equal(case.inputs[key], inputs[key]) for key in ("input_ids", "pixel_values"))
            prefilled = model(**inputs)
        first = prefilled.logits[:, -1].argmax(dim=1).tolist()
        assert first == [answers[1][0]] * 2 == case.language().logits[:, -1].argmax(dim=1).tolist()
        assert {len(answer) for answer in answers} == {4}


def test_questions_are_asked_in_the_models_chat_template():
    processor = tiny.processor()
    question = PrefillQuestion("what?", tiny.picture())
    assert efficiency.prompts(processor, [question]) == ["<image>\nwhat?"]
    processor.chat_template = chat_template(chatml("be brief"), processor.tokenizer)
    (prompt,) = efficiency.prompts(processor, [question])
    assert (
        prompt.count("<image>") == 1 and "be brief" in prompt and prompt.endswith("<|im_start|>assistant\n")
    )


def test_made_up_questions_are_about_a_picture_of_several_tiles():
    family = family_of(tiny.llava("next"))
    questions = made_up_questions(family, 3)
    assert len({question.text for question in questions}) == 3
    width, height = questions[0].image().size
    assert family.num_tiles((height, width)) == 5


def test_bad_input_is_refused(run, tmp_path, tiny_folder, monkeypatch, capsys):
    refused(command, monkeypatch, capsys, tmp_path, words=["not a run folder"])
    refused(command, monkeypatch, capsys, tiny_folder, words=["budget"])
    refused(command, monkeypatch, capsys, run, "--budget", 9, words=["not tuned for budget=9"])
    refused(command, monkeypatch, capsys, run, "--against", tmp_path, words=["not a run folder"])
    (run / "meta.json").unlink()
    (run / "config.yaml").write_text("data: {held_out: null}\nevaluate: {questions: 8}\n")
    refused(command, monkeypatch, capsys, run, words=["has not finished"])
