"""What lmms-eval asks a model through, without lmms-eval: answers in batches, the local task's questions, the table."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import vzip
from scripts.evaluate import main as evaluation
from scripts.evaluate import target as eval_subject
from scripts.evaluate.environment import eval_python
from scripts.evaluate.held_out_task import held_out
from scripts.evaluate.questions import write_questions
from scripts.evaluate.table import print_scores, table_of
from scripts.evaluate.target import digest, rows_of_run
from scripts.evaluate.tasks import PAPER, TASK, published_rows, scores_of
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.runs import attached, edit_meta, save_run, tune
from tests.helpers.server import Server
from tests.unit.test_videos import numbers_of, write_video
from train import config
from train.evaluate import _normal
from vzip import UserError
from vzip.integrations.answering import Answerer, GenerationSettings, _frames, cut
from vzip.runs.export import write_hf
from vzip.runs.projector import ADAPTER, read_meta
from vzip.templates.encode import chatml, encode, vicuna
from vzip.templates.jinja import chat_template
from vzip.videos import read_frames

GREEDY = {"max_new_tokens": 5, "temperature": 0.7, "do_sample": False, "image_aspect_ratio": "original"}


def asked(text, *media):
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def image(seed, *size):
    return {"type": "image", "url": tiny.picture(seed, *size)}


def video(seed):
    return {"type": "video", "url": tiny.video(seed)}


def finished_run(folder, base):
    return save_run(folder, tune(attached(base)), base, template=asdict(vicuna()))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    return finished_run(tmp_path_factory.mktemp("runs") / "run", tiny_folder)


@pytest.fixture(scope="module")
def answerer(run):
    return Answerer(GenerationSettings(pretrained=str(run), device="cpu"))


# Settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "pretrained=... is missing"),
        (
            {"pretrained": "x", "colour": "red"},
            "colour=red is no setting of vzip; there are: pretrained, row, budget",
        ),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size=auto must be a whole number"),
        ({"pretrained": "x", "budget": "half"}, "budget=half must be a whole number"),
        ({"pretrained": "x", "dtype": "int8"}, "dtype=int8 must be one of: bfloat16"),
        (
            {"pretrained": "x", "row": "free", "budget": "full"},
            "row=free and budget=full contradict each other",
        ),
        ({"pretrained": "x", "row": "full", "budget": 64}, "row=full and budget=64 contradict each other"),
    ],
)
def test_a_mistake_in_the_settings_is_named(given, words):
    with pytest.raises(UserError, match=words):
        GenerationSettings.of(given)


def test_settings_come_as_numbers_or_text():
    made = GenerationSettings.of({"pretrained": "x", "batch_size": "4", "budget": 64, "row": None})
    assert (made.batch_size, made.budget, made.row) == (4, 64, None)


@pytest.mark.parametrize(
    ("given", "row", "num_tokens"),
    [
        ({}, "tuned", 6),
        ({"budget": "full"}, "full", 16),
        ({"row": "free", "budget": 9}, "free", 9),
    ],
)
def test_settings_choose_the_row(run, given, row, num_tokens):
    chosen = Answerer(GenerationSettings.of({"pretrained": str(run), "device": "cpu", **given}))
    question = asked("what?", image(0))
    (found,) = chosen.answers([question], GREEDY)
    with vzip.Comparison.open(run, device="cpu").row(
        row, budget=given.get("budget") if row == "free" else None
    ) as (
        model,
        processor,
    ):
        text = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=[tiny.picture(0)], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == num_tokens
    assert found.num_prompt_tokens == inputs["input_ids"].shape[1]
    end = made[0, inputs["input_ids"].shape[1] :]
    assert found.text == processor.tokenizer.decode(end, skip_special_tokens=True).strip()
    assert found.num_tokens == len(end)


def test_a_budget_that_the_run_was_not_tuned_for_is_refused(run):
    with pytest.raises(UserError, match="not tuned for budget=9"):
        Answerer(GenerationSettings(pretrained=str(run), budget=9, device="cpu"))


def test_a_base_model_without_a_chat_template_is_refused(tiny_folder):
    with pytest.raises(UserError, match="has no chat template"):
        Answerer(GenerationSettings(pretrained=str(tiny_folder), budget=6, device="cpu"))


# Answers


@pytest.mark.parametrize("kind", ["clip", "onevision", "video"])
def test_a_batch_is_answered_as_its_questions_alone(kind, tmp_path):
    model, processor = tiny.llava(kind), tiny.processor(kind)
    with torch.no_grad():  # as initialised, every question has the same answer
        for parameter in (
            *model.model.language_model.parameters(),
            *model.model.multi_modal_projector.parameters(),
        ):
            parameter.mul_(8)
    model.save_pretrained(tmp_path)
    processor.chat_template = chat_template(vicuna(), processor.tokenizer)
    processor.save_pretrained(tmp_path)
    questions = [
        asked("two of them, and a long question?", image(1), image(2, 40, 90)),
        asked("no picture"),
        [
            *asked("which?", image(3)),
            {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
            *asked("sure?"),
        ],
        asked("moves?", *([video(1)] if kind in tiny.VIDEO else [image(4)])),
        asked("moves?", *([video(2)] if kind in tiny.VIDEO else [image(5)])),
    ]
    answering = Answerer(
        GenerationSettings.of({"pretrained": str(tmp_path), "budget": 6, "dtype": "float32", "device": "cpu"})
    )
    together = answering.answers(questions, GREEDY)
    assert together == [answering.answers([question], GREEDY)[0] for question in questions]
    assert len({answer.text for answer in together}) == len(questions)


def test_an_answer_ends_at_the_templates_end_token_as_well_as_the_models(tmp_path):
    model, processor = tiny.llava(), tiny.processor()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    processor.chat_template = chat_template(chatml("kind"), processor.tokenizer)
    processor.save_pretrained(tmp_path)
    answering = Answerer(GenerationSettings(pretrained=str(tmp_path), budget=6, device="cpu"))
    head = answering.comparison.family.lm_head
    head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor([end]), 99.0))
    (answer,) = answering.answers([asked("what?", image(0))], GREEDY)
    assert (answer.text, answer.num_tokens) == ("", 1)


def test_media_that_the_model_does_not_take_is_refused(answerer):
    with pytest.raises(UserError, match="type 'video', which a 'llava' model does not take"):
        answerer.answers([asked("moves?", video(0))], GREEDY)


def test_pictures_come_as_paths_too(answerer, tmp_path):
    tiny.picture(3).save(tmp_path / "3.png")
    path = asked("what?", {"type": "image", "url": str(tmp_path / "3.png")})
    assert answerer.answers([path], GREEDY) == answerer.answers([asked("what?", image(3))], GREEDY)


def test_frames_of_a_video_file_are_those_that_training_takes(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert numbers_of(_frames(str(path), 4)) == numbers_of(read_frames(path, 4))


def test_sampling_is_only_done_where_it_is_asked_for(answerer):
    questions = [asked("what?", image(0))] * 8
    sampled = answerer.answers(questions, {"max_new_tokens": 5, "temperature": 5.0, "do_sample": True})
    greedy = answerer.answers(questions, {"max_new_tokens": 5, "temperature": 0})
    assert len({answer.text for answer in sampled}) > 1
    assert len({answer.text for answer in greedy}) == 1


@pytest.mark.parametrize(
    ("text", "until", "kept"),
    [
        (" a\n\nb ", ["\n\n"], "a"),
        ("a", None, "a"),
        ("a END b", "END", "a"),
        ("ab", ["", "b"], "a"),
        ("aXbY", ["Y", "X"], "a"),
    ],
)
def test_an_answer_ends_before_the_first_of_its_ends(text, until, kept):
    assert cut(text, until) == kept


# The local task


ROWS = [
    {
        "id": "a",
        "image": ["0.png", "1.png"],
        "type": "open",
        "conversations": [
            {"from": "human", "value": "which <image>?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "and\n<image>"},
            {"from": "gpt", "value": "a dog"},
        ],
    },
    {"id": "b", "conversations": [{"from": "human", "value": " 1 + 1? "}, {"from": "gpt", "value": "2"}]},
]


@pytest.fixture
def questioned(run, tmp_path, overrides, monkeypatch):
    """The run's folder with the settings of a run that has `ROWS` as its held-out questions."""
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "data"))
    for name in ("0.png", "1.png"):
        tiny.picture(int(name[0])).save(tmp_path / name)
    (tmp_path / "test.json").write_text(json.dumps(ROWS))
    config.register()
    own = [f"data.held_out={tmp_path}/test.json", f"data.image_folder={tmp_path}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("tune", [*overrides, *own])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return tmp_path / "run"


def documents_of(folder):
    task = json.loads((folder / f"{TASK}.yaml").read_text())
    return task, list(
        datasets.Dataset.from_parquet(
            task["dataset_kwargs"]["data_files"]["test"], cache_dir=folder / "cache"
        )
    )


def test_questions_are_asked_as_the_recipe_asks_them(questioned):
    task, documents = documents_of(write_questions(questioned))
    assert [metric["metric"] for metric in task["metric_list"]] == ["open", "all"]
    assert task["generation_kwargs"]["max_new_tokens"] == 8
    assert [document["answer"] for document in documents] == ["A cat.", "a dog", "2"]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_template(vicuna(), tokenizer)
    turns = [("which <image>?", "A cat."), ("and\n<image>", "a dog"), (" 1 + 1? ", "2")]
    for number, (document, before) in enumerate(zip(documents, ([], turns[:1], []), strict=True)):
        messages = held_out.messages(document)
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))[
            "input_ids"
        ]
        assert ids == encode(vicuna(), tokenizer, [*before, (turns[number][0], None)])[0]
    shown = [
        part["url"]
        for message in held_out.messages(documents[1])
        for part in message["content"]
        if "url" in part
    ]
    assert [list(picture.getdata()) for picture in shown] == [
        list(tiny.picture(seed).getdata()) for seed in (0, 1)
    ]


def test_the_same_questions_are_the_same_file(questioned):
    first = write_questions(questioned)
    made = (first / "questions.parquet").stat().st_mtime_ns
    assert write_questions(questioned) == first and (first / "questions.parquet").stat().st_mtime_ns == made
    tiny.picture(7).save(questioned.parent / "0.png")
    assert write_questions(questioned) != first


@pytest.mark.parametrize("answer", ["Yes.", " yes ", "no", "'A  Cat'!", "", "...", "Ja, ja."])
def test_answers_are_compared_as_after_tuning(answer):
    assert held_out.normal(answer) == _normal(answer)
    assert held_out.graded({"kind": "open", "answer": answer}, [f"  {answer.upper()}. "]) == {
        "open": 1.0,
        "all": 1.0,
    }
    assert held_out.graded({"kind": "all", "answer": answer}, ["other"]) == {"all": 0.0}


# The command


def test_rows_of_a_run_and_of_a_base_model(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [(row.name, row.row, row.budget) for row in rows_of_run(run)] == [
        ("full", "full", None),
        ("free", "free", 6),
        ("tuned", "tuned", 6),
    ]
    given = argparse.Namespace(source=str(tiny_folder), budget=[6, 9], out=tmp_path, batch_size=None)
    assert [(row.name, row.budget) for row in evaluation.subject_of(given).rows] == [
        ("full", None),
        ("free-6", 6),
        ("free-9", 9),
    ]
    with pytest.raises(UserError, match="which has its own; leave --budget out"):
        evaluation.subject_of(argparse.Namespace(source=str(run), budget=[6], out=tmp_path, batch_size=None))
    with pytest.raises(UserError, match="llava-hf/x is no run folder, whose budget would be known"):
        evaluation.subject_of(
            argparse.Namespace(source="llava-hf/x", budget=None, out=tmp_path, batch_size=None)
        )
    with pytest.raises(UserError, match="is not a run folder"):
        evaluation.subject_of(
            argparse.Namespace(source=str(tmp_path), budget=None, out=tmp_path, batch_size=None)
        )


def test_a_run_of_several_budgets_has_a_row_for_each(run, tmp_path):
    meta = json.loads((run / "meta.json").read_text())
    meta["other_budgets"] = {"9": {"name": "visionzip", "dominant": 7, "contextual": 2}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert [row.name for row in rows_of_run(tmp_path)] == ["full", "free-6", "free-9", "tuned-6", "tuned-9"]


def subject(source, tmp_path, budget=None):
    return evaluation.subject_of(
        argparse.Namespace(source=str(source), budget=budget, out=tmp_path, batch_size=None)
    )


def test_an_export_has_the_row_tuned_and_is_the_papers_model(run, tmp_path):
    edited = shutil.copytree(run, tmp_path / "run")
    edit_meta(
        edited,
        lambda meta: meta.update(other_budgets={"9": {"name": "visionzip", "dominant": 7, "contextual": 2}}),
    )
    (tmp_path / "export").mkdir()
    write_hf(edited, tmp_path / "export")
    found = subject(tmp_path / "export", tmp_path)
    assert [(row.name, row.row, row.budget) for row in found.rows] == [
        ("tuned-6", "tuned", 6),
        ("tuned-9", "tuned", 9),
    ]
    assert found.run is None and found.names == [read_meta(tmp_path / "export")["base"]["id"]]
    with pytest.raises(UserError, match="an export, which has its own; leave --budget out"):
        subject(tmp_path / "export", tmp_path, budget=[6])


def test_a_base_model_with_a_recipe_is_asked_in_the_recipes_template(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert subject("llava-hf/llava-1.5-7b-hf", tmp_path, budget=[64]).template == asdict(vicuna())
    assert subject(tiny_folder, tmp_path, budget=[6]).template is None
    assert subject(run, tmp_path).template is None  # it has its own


def test_a_run_that_was_stopped_before_its_results_is_refused(run, tmp_path):
    stopped = shutil.copytree(run, tmp_path / "run")
    (stopped / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=r"has not finished: it has no result\.json"):
        subject(stopped, tmp_path)


def test_other_weights_are_another_model(run, tiny_folder, tmp_path):
    tuned, base = shutil.copytree(run, tmp_path / "run"), shutil.copytree(tiny_folder, tmp_path / "base")
    (tuned / ADAPTER).mkdir()
    (tuned / ADAPTER / "adapter_model.safetensors").write_bytes(b"some")
    before = subject(tuned, tmp_path).model, subject(base, tmp_path, budget=[6]).model
    (base / "README.md").write_text("a card changes nothing")
    assert before == (subject(tuned, tmp_path).model, subject(base, tmp_path, budget=[6]).model)
    (tuned / ADAPTER / "adapter_model.safetensors").write_bytes(b"more")
    shutil.copy(tiny.save_llava(tmp_path / "other", seed=1) / "model.safetensors", base)
    after = subject(tuned, tmp_path).model, subject(base, tmp_path, budget=[6]).model
    assert before[0] != after[0] and before[1] != after[1]


def test_a_large_file_is_known_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_subject, "LARGE", 2)
    (tmp_path / "a").write_bytes(b"abc")
    before = digest([tmp_path / "a"])
    os.utime(tmp_path / "a", ns=(1, 1))
    assert digest([tmp_path / "a"]) != before


def test_the_local_task_is_left_out_where_its_questions_are_not_there(questioned, run, monkeypatch):
    (questioned.parent / "test.json").unlink()
    folder, (reason,) = evaluation.questions_to_ask(questioned)
    assert (
        folder is None and reason.startswith(f"{TASK} is left out") and "put the file there again" in reason
    )
    assert (
        evaluation.questions_to_ask(run)[0] is None
    )  # of its own it has none, and the embedded default's are not made
    assert "`make data`, without MODEL" in evaluation.questions_to_ask(run)[1][0]
    cells = evaluation.cells_of(rows_of_run(run)[:1], ["gqa"], questions=None, folder=run, stamp={})
    assert [cell["task"] for cell in cells] == ["gqa"]
    monkeypatch.setattr(sys, "argv", ["eval.py", str(run)])
    monkeypatch.setattr(evaluation, "hub_answers", lambda: False)
    with pytest.raises(UserError, match="nothing left to ask"):
        evaluation.main.__wrapped__()


def test_several_processes_have_devices_of_their_own():
    named = argparse.Namespace(device="cpu", processes=None)
    assert evaluation.processes_of(named) == 1
    with pytest.raises(UserError, match="--device cpu and --processes 2 contradict"):
        evaluation.processes_of(argparse.Namespace(device="cpu", processes=2))


HARNESS = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
for number, cell in enumerate(json.loads(path.read_text())["cells"], start=1):
    with open(sys.argv[0] + ".asked", "a") as file:
        print(cell, file=file)
    if cell == "bad":
        (path.parent / "failed").write_text(str(number))
        sys.exit(1)
"""


def test_a_task_that_fails_in_several_processes_is_left_out_and_the_others_are_asked(tmp_path, monkeypatch):
    (tmp_path / "harness.py").write_text(HARNESS)
    monkeypatch.setattr(evaluation, "eval_python", lambda: Path(sys.executable))
    monkeypatch.setattr(
        evaluation, "harness_command", lambda python, processes: [str(python), str(tmp_path / "harness.py")]
    )
    job = {"cells": ["good", "bad", "bad", "fine"]}
    assert evaluation.run_harness(job, processes=2, online=False) == 1
    assert (tmp_path / "harness.py.asked").read_text().split() == job["cells"]


def test_the_hub_is_asked_once_and_not_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(evaluation.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    assert not evaluation.hub_answers()
    with Server(tmp_path) as server:
        monkeypatch.setattr(evaluation.constants, "ENDPOINT", server.url)
        assert evaluation.hub_answers()  # "404" is an answer too
        monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", True)
        assert not evaluation.hub_answers()


def test_tasks_that_need_the_network_are_left_out_without_one(monkeypatch):
    monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", False)
    names, (reason,) = evaluation.tasks_to_run(None, online=False)
    assert names == [] and "does not answer" in reason and "GQA" in reason and "MMVet" in reason
    assert evaluation.tasks_to_run(TASK, online=False) == ([], [])
    with pytest.raises(UserError, match=r"--tasks gqa,pope: .* does not answer; connect"):
        evaluation.tasks_to_run(f"gqa, pope,{TASK}", online=False)
    monkeypatch.setattr(
        evaluation.constants, "HF_HUB_OFFLINE", True
    )  # the user says that the data is in the cache
    assert evaluation.tasks_to_run("gqa", online=False) == (["gqa"], [])


def test_tasks_that_are_judged_need_the_judges_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    names, (reason,) = evaluation.tasks_to_run(None, online=True)
    assert names == [task.name for task in PAPER if task.key is None] and "needs OPENAI_API_KEY" in reason
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        evaluation.tasks_to_run("gqa,mmvet", online=True)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    assert evaluation.tasks_to_run(None, online=True) == ([task.name for task in PAPER], [])


def test_a_cell_is_finished_if_it_was_made_with_the_same_settings(run, tmp_path):
    rows = rows_of_run(run)

    def cells(limit=None, questions="abc"):
        return evaluation.cells_of(
            rows, ["gqa"], questions=tmp_path / questions, folder=tmp_path, stamp={"limit": limit}
        )

    first, *others = cells()
    assert [(cell["name"], cell["task"]) for cell in cells()[:3]] == [
        ("full", TASK),
        ("full", "gqa"),
        ("free", TASK),
    ]
    assert evaluation.finished(first) is None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / f"{TASK}.json").write_text(json.dumps({"stamp": first["stamp"], "row": "full"}))
    assert evaluation.finished(first)["row"] == "full"
    assert [evaluation.finished(cell) for cell in others] == [None] * len(others)
    assert evaluation.finished(cells(limit=3)[0]) is None
    assert evaluation.finished({**first, "stamp": {**first["stamp"], "budget": 9}}) is None
    assert evaluation.finished(cells(questions="def")[0]) is None


def test_an_environment_that_pip_cannot_fill_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "requirements.txt").write_text("no-such-package-at-all==1.0\n")
    with pytest.raises(UserError, match="pip can't install lmms-eval"):
        eval_python(tmp_path / "environment", requirements=tmp_path / "requirements.txt")
    assert not (tmp_path / "environment" / "made-of").exists()  # the next command tries again


# The table


def result(row, budget, num_tokens, **results):
    cell = {"name": row, "row": row, "budget": budget, "task": next(iter(results))}
    counts = dict.fromkeys(results, 10)
    return cell, {
        "num_visual_tokens": num_tokens,
        "seconds": 1.5,
        "results": results,
        "num_questions": counts,
        "table": "a table",
        "prompt": "USER: QUESTION",
    }


def test_scores_are_the_papers_columns():
    assert scores_of(
        {"gqa": {"alias": "gqa", "exact_match,none": 0.619, "exact_match_stderr,none": 0.1}}
    ) == {"GQA": 61.9}
    mme = {
        "mme_perception_score,none": 1500.0,
        "mme_cognition_score,none": 362.0,
        "mme_cognition_score_stderr,none": "N/A",
    }
    assert scores_of({"mme": mme}) == {"MME": 1862.0}
    assert scores_of({"mmbench_en_dev_static": {"gpt_eval_score,none": 64.7, "submission,none": None}}) == {
        "MMB": 64.7
    }
    assert scores_of({TASK: {"open,none": 0.5, "open_stderr_clt,none": 0.1}}) == {"held out: open": 50.0}
    assert scores_of({"chartqa": {"relaxed,none": 0.25}}) == {"chartqa: relaxed": 0.25}


def test_the_table_has_per_cent_of_full_and_the_papers_rows(capsys):
    cells = [
        result("full", None, 576, gqa={"exact_match,none": 0.60}),
        result("full", None, 576, pope={"pope_f1_score,none": 0.80}),
        result("free", 64, 64, gqa={"exact_match,none": 0.54}),
        result("free", 64, 64, pope={"pope_f1_score,none": 0.60}),
        result("tuned", 64, 64, gqa={"exact_match,none": 0.57}),
    ]
    table = table_of(cells, published_rows([None, "llava-7b"]))
    full, free, tuned = table["rows"]
    assert free["scores"] == pytest.approx({"GQA": 54.0, "POPE": 60.0})
    assert free["percent_of_full"] == pytest.approx({"GQA": 90.0, "POPE": 75.0})
    assert free["average_percent"] == pytest.approx(82.5) and free["seconds"] == 3.0
    assert tuned["average_percent"] == pytest.approx(95.0) and full["average_percent"] == 100.0
    assert [(row["name"], row["scores"]["GQA"], row["average_percent"]) for row in table["paper"]] == [
        ("full", 61.9, 100),
        (
            "free",
            55.1,
            pytest.approx(100 * (55.1 / 61.9 + 77.0 / 85.9) / 2),
        ),  # over what was asked here alone
        ("tuned", 57.0, pytest.approx(100 * 57.0 / 61.9)),
    ]
    print_scores(table, title="a model")
    shown = capsys.readouterr().out
    assert (
        "a table" in shown and "54.0 (90%)" in shown and "55.1 (89%)" in shown and shown.count("paper") == 3
    )
    assert "asked as 'USER: QUESTION'" in shown


@pytest.mark.parametrize("name", ["llava-13b", "llava-hf/llava-1.5-13b-hf"])
def test_published_rows_are_found_by_recipe_and_by_id(name):
    full, *others = published_rows([name])
    assert full["scores"]["POPE"] == 85.9 and {row["num_visual_tokens"] for row in others} == {64, 128, 192}
    assert published_rows(["smol", "a/folder"]) == []


def test_published_averages_are_those_of_the_scores():
    """A slip of the pen in the paper's numbers would show: an average is the mean per cent of `full`."""
    for name in ("llava-7b", "video-llava-7b"):
        full, *others = published_rows([name])
        for row in others:
            shares = [100 * row["scores"][column] / full["scores"][column] for column in full["scores"]]
            assert sum(shares) / len(shares) == pytest.approx(row["average"], abs=0.15)
