"""The efficiency report: it measures what the model computes, and its table has every setting."""

import json
from types import SimpleNamespace

import pytest
import torch

from scripts.efficiency import main as efficiency
from scripts.efficiency.measure import EfficiencySetting, paper_flops
from scripts.efficiency.questions import PrefillQuestion, made_up_questions, prompts
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip import Comparison
from vzip.families import family_of
from vzip.templates.encode import chatml
from vzip.templates.jinja import chat_template

pytestmark = pytest.mark.slow

KV_VALUES_OF_A_TOKEN = 2 * 2 * 2 * 12
"""Layers, keys and values, heads, width of a head."""
QUICK = ("--questions", 1, "--new-tokens", 1, "--rounds", 1)


@pytest.mark.slow
def test_a_run_is_compared_with_itself_and_with_another_model(run, tmp_path, call):
    other = tiny.save_llava(tmp_path / "small", "siglip", seed=4)
    path = tmp_path / "new" / "figures.json"
    counts = ("--questions", 3, "--new-tokens", 2, "--rounds", 2, "--batch", 2)
    printed = call(efficiency.main, run, *counts, "--against", other, "--json", path)

    figures = json.loads(path.read_text())
    rows = figures["rows"]
    assert figures["made_up_questions"] and "3 questions about noise" in printed
    assert list(rows) == ["full", "tuned", "full of small"]
    assert [row["num_visual_tokens"] for row in rows.values()] == [16, 6, 16]
    for name, row in rows.items():
        # A model that is not a run's is loaded in bfloat16.
        element_size = 2 if "small" in name else 4
        num_tokens = row["num_visual_tokens"] + row["num_text_tokens"]
        assert row["kv_bytes"] == 2 * num_tokens * KV_VALUES_OF_A_TOKEN * element_size
        assert row["weight_bytes"] > 100_000
        assert row["total_bytes"] == row["weight_bytes"] + row["peak_bytes"]
        for part in ("language", "whole", "token", "questions"):
            assert len(row[part]["seconds"]) == 2

    full, tuned, small = rows.values()
    assert full["num_text_tokens"] == tuned["num_text_tokens"]
    assert full["language_flops"] > tuned["language_flops"]

    for label in (
        "visual tokens",
        "first token",
        "3 questions, 2 new tokens each",
        "KV cache",
        "peak memory",
    ):
        assert label in printed
    for formula in ("language_flops", "whole_flops", "paper_flops"):
        assert f"{full[formula] / tuned[formula]:.2f}" in printed
    assert f"{small['paper_flops'] / tuned['paper_flops']:.2f}" in printed
    assert f"{16 / 6:.2f}" in printed

    pairs = zip(full["whole"]["seconds"], tuned["whole"]["seconds"], strict=True)
    ratios = [seconds / reduced for seconds, reduced in pairs]
    median = full["whole"]["median_s"] / tuned["whole"]["median_s"]
    assert f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" in printed


def test_the_papers_formula():
    vicuna = SimpleNamespace(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    expected = 32 * (4 * 640 * 4096**2 + 2 * 640**2 * 4096 + 2 * 640 * 4096 * 11008)
    assert paper_flops(vicuna, 640) == expected


def test_a_run_whose_questions_have_no_picture_is_asked_about_noise(run, tmp_path, monkeypatch, call):
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "data"))
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "questions.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    settings = {
        "data": {"held_out": str(tmp_path / "questions.json"), "image_folder": str(tmp_path)},
        "evaluate": {"questions": 8},
    }
    (run / "config.yaml").write_text(json.dumps(settings))
    (run / "result.json").write_text("{}")

    assert "questions about noise" in call(efficiency.main, run, *QUICK)
    assert json.loads((run / "efficiency.json").read_text())["made_up_questions"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next", "mini-gemini", "video", "onevision"])
def test_every_family_is_measured(kind, tmp_path, call):
    path = tmp_path / "figures.json"
    options = ("--budget", 20 if kind == "next" else 4, "--json", path)
    call(efficiency.main, tiny.save_llava(tmp_path / "model", kind), *options, *QUICK)

    full, free = json.loads(path.read_text())["rows"].values()
    assert full["num_visual_tokens"] > free["num_visual_tokens"]
    assert full["whole_flops"] > free["whole_flops"]
    assert "Identity" in full["reducer"]
    assert "VisionZip" in free["reducer"]


@torch.no_grad()
def test_the_timed_prefill_is_that_of_the_answer(run):
    comparison = Comparison.open(run, device="cpu")
    texts = ("a?", "what is it?", "why?")
    questions = [PrefillQuestion(text, tiny.picture(seed)) for seed, text in enumerate(texts)]
    for name in ("full", "tuned"):
        setting = EfficiencySetting(comparison, name, budget=None)
        answers = setting.answer(questions, batch=2, new_tokens=4)
        assert {len(answer) for answer in answers} == {4}
        assert answers == setting.answer(questions, batch=1, new_tokens=4)  # padding changes nothing

        case = setting.prefill(questions[1], batch=2)
        with comparison.row(name):
            assert case.language().logits[:, -1].argmax(dim=1).tolist() == [answers[1][0]] * 2


def test_questions_are_asked_in_the_models_chat_template():
    processor = tiny.processor()
    question = PrefillQuestion("what?", tiny.picture())
    assert prompts(processor, [question]) == ["<image>\nwhat?"]

    processor.chat_template = chat_template(chatml("be brief"), processor.tokenizer)
    (prompt,) = prompts(processor, [question])
    assert prompt.count("<image>") == 1
    assert "be brief" in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_made_up_questions_are_about_a_picture_of_several_tiles():
    family = family_of(tiny.llava("next"))
    questions = made_up_questions(family, 3)
    assert len({question.text for question in questions}) == 3
    width, height = questions[0].image().size
    assert family.num_tiles((height, width)) == 5


def test_bad_sources_and_budgets_are_refused(run, tmp_path, tiny_folder, call):
    refused(call, efficiency.main, tmp_path, words=["not a run folder"])
    refused(call, efficiency.main, tiny_folder, words=["budget"])
    refused(call, efficiency.main, run, "--budget", 9, words=["not tuned for budget=9"])
    refused(call, efficiency.main, run, "--against", tmp_path, words=["not a run folder"])

    (run / "meta.json").unlink()
    (run / "config.yaml").write_text("data: {held_out: null}\nevaluate: {questions: 8}\n")
    refused(call, efficiency.main, run, words=["has not finished"])
