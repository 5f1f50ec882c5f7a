"""Held-out questions as a task of lmms-eval."""

import json

import datasets
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from scripts.evaluate.held_out_task import held_out
from scripts.evaluate.main import questions_to_ask
from scripts.evaluate.questions import write_questions
from scripts.evaluate.tasks import HELD_OUT
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.broken import messages
from train import config
from vzip.templates.encode import encode, vicuna
from vzip.templates.jinja import chat_template

CONVERSATIONS = [
    {
        "id": "a",
        "image": ["0.png", "1.png"],
        "type": "open",
        "conversations": messages("which <image>?", "A cat.", "and\n<image>", "a dog"),
    },
    {"id": "b", "conversations": messages(" 1 + 1? ", "2")},
]


@pytest.fixture
def run_with_questions(tmp_path, overrides, monkeypatch):
    """The folder of a run that has `CONVERSATIONS` as its held-out questions."""
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "data"))
    for number in (0, 1):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "test.json").write_text(json.dumps(CONVERSATIONS))

    config.register()
    data = [f"data.held_out={tmp_path}/test.json", f"data.image_folder={tmp_path}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("tune", [*overrides, *data])

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return tmp_path / "run"


def test_questions_are_asked_as_in_training(run_with_questions):
    folder = write_questions(run_with_questions)
    task = json.loads((folder / f"{HELD_OUT}.yaml").read_text())
    assert [metric["metric"] for metric in task["metric_list"]] == ["open", "all"]
    assert task["generation_kwargs"]["max_new_tokens"] == 8

    file = task["dataset_kwargs"]["data_files"]["test"]
    documents = list(datasets.Dataset.from_parquet(file, cache_dir=folder / "cache"))
    assert [document["answer"] for document in documents] == ["A cat.", "a dog", "2"]

    # The prompt has the same ids as the recipe's own encoding of the conversation up to the question.
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_template(vicuna(), tokenizer)
    second = [("which <image>?", "A cat."), ("and\n<image>", None)]
    prompts = [[("which <image>?", None)], second, [(" 1 + 1? ", None)]]
    for document, turns in zip(documents, prompts, strict=True):
        messages = held_out.messages(document)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text)["input_ids"] == encode(vicuna(), tokenizer, turns)[0]

    # The second question is asked with both pictures: its own, and that of the turn before it.
    parts = [part for message in held_out.messages(documents[1]) for part in message["content"]]
    pictures = [part["url"] for part in parts if "url" in part]
    assert [picture.tobytes() for picture in pictures] == [tiny.picture(n).tobytes() for n in (0, 1)]


def test_the_same_questions_are_written_once(run_with_questions):
    folder = write_questions(run_with_questions)
    time = (folder / "questions.parquet").stat().st_mtime_ns

    assert write_questions(run_with_questions) == folder
    assert (folder / "questions.parquet").stat().st_mtime_ns == time

    tiny.picture(7).save(run_with_questions.parent / "0.png")
    assert write_questions(run_with_questions) != folder


def test_questions_are_left_out_if_their_file_is_gone(run_with_questions, run):
    (run_with_questions.parent / "test.json").unlink()
    folder, (reason,) = questions_to_ask(run_with_questions)
    assert folder is None
    assert reason.startswith(f"{HELD_OUT} is left out")
    assert "put the file there again" in reason

    # This run has no questions of its own, and those of the embedded default are not prepared here.
    folder, (reason,) = questions_to_ask(run)
    assert folder is None
    assert "`make data`, without MODEL" in reason


@pytest.mark.parametrize("answer", ["Yes.", "'A  Cat'!", ""])
def test_an_answer_is_graded_under_its_kind_and_under_all(answer):
    question = {"kind": "open", "answer": answer}
    assert held_out.graded(question, [f"  {answer.upper()}. "]) == {"open": 1.0, "all": 1.0}
    assert held_out.graded({"kind": "all", "answer": answer}, ["other"]) == {"all": 0.0}
