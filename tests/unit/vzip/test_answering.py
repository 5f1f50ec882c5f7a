"""Answers to batches of conversations, as evaluation harnesses ask for them."""

from dataclasses import asdict

import pytest
import torch

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import attached, save_run, tune
from vzip.families import family_of
from vzip.integrations.answering import Answerer, GenerationSettings, cut
from vzip.templates.encode import chatml, vicuna
from vzip.templates.jinja import chat_template

GREEDY = {"max_new_tokens": 5, "temperature": 0.7, "do_sample": False, "image_aspect_ratio": "original"}


def conversation(text, *media):
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def image(seed, *size):
    return {"type": "image", "url": tiny.picture(seed, *size)}


def video(seed):
    return {"type": "video", "url": tiny.video(seed)}


def answerer_of(source, **settings):
    return Answerer(GenerationSettings.of({"pretrained": str(source), "device": "cpu", **settings}))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save_run(folder, tune(attached(tiny_folder)), tiny_folder, template=asdict(vicuna()))


@pytest.fixture(scope="module")
def answerer(run):
    return answerer_of(run)


def save_base(folder, model, processor, template):
    """Write a base model with a chat template; returns its folder."""
    model.save_pretrained(folder)
    processor.chat_template = chat_template(template, processor.tokenizer)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "pretrained=... is missing"),
        ({"colour": "red"}, "colour=red is not a setting of vzip; choose from: pretrained, row, budget"),
        ({"batch_size": "auto"}, "batch_size=auto must be a whole number"),
        ({"budget": "half"}, "budget=half must be a whole number"),
        ({"dtype": "int8"}, "dtype=int8 must be one of: bfloat16"),
        ({"row": "free", "budget": "full"}, "row=free and budget=full contradict each other"),
        ({"row": "full", "budget": 64}, "row=full and budget=64 contradict each other"),
    ],
)
def test_a_mistake_in_the_settings_is_named(arguments, words):
    pretrained = {"pretrained": "x"} if arguments else {}
    refused(GenerationSettings.of, {**pretrained, **arguments}, words=[words])


def test_numbers_may_come_as_text():
    settings = GenerationSettings.of({"pretrained": "x", "batch_size": "4", "budget": 64, "row": None})
    assert (settings.batch_size, settings.budget, settings.row) == (4, 64, None)


@pytest.mark.parametrize(
    ("settings", "row", "num_tokens"),
    [({}, "tuned", 6), ({"budget": "full"}, "full", 16), ({"row": "free", "budget": 9}, "free", 9)],
)
def test_the_chosen_setting_answers(run, settings, row, num_tokens):
    question = conversation("what?", image(0))
    (answer,) = answerer_of(run, **settings).answers([question], GREEDY)

    budget = settings.get("budget") if row == "free" else None
    with vzip.Comparison.open(run, device="cpu").row(row, budget=budget) as (model, processor):
        text = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=text, images=[tiny.picture(0)], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)

    prompt = inputs["input_ids"]
    assert (prompt == model.config.image_token_id).sum() == num_tokens
    assert answer.num_prompt_tokens == prompt.shape[1]
    expected = output[0, prompt.shape[1] :]
    assert answer.text == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert answer.num_tokens == len(expected)


def test_what_a_source_lacks_is_refused(run, tiny_folder, answerer):
    refused(answerer_of, run, budget=9, words=["not tuned for budget=9"])
    refused(answerer_of, tiny_folder, budget=6, words=["has no chat template"])
    question = conversation("moves?", video(0))
    refused(answerer.answers, [question], GREEDY, words=["type 'video', which a 'llava' model does not take"])


@pytest.mark.parametrize("kind", ["clip", "onevision", "video"])
def test_a_batch_is_answered_as_its_questions_alone(kind, tmp_path):
    model = tiny.llava(kind)
    parts = (model.model.language_model, family_of(model).projector)
    with torch.no_grad():
        # With the weights that it is made with, the model gives the same answer to every question.
        for parameter in [parameter for part in parts for parameter in part.parameters()]:
            parameter.mul_(8)
    save_base(tmp_path, model, tiny.processor(kind), vicuna())

    def clip(seed):
        return video(seed) if kind in tiny.VIDEO else image(3 + seed)

    earlier_answer = {"role": "assistant", "content": [{"type": "text", "text": "this"}]}
    questions = [
        conversation("two of them, and a long question?", image(1), image(2, 40, 90)),
        conversation("no picture"),
        [*conversation("which?", image(3)), earlier_answer, *conversation("sure?")],
        conversation("moves?", clip(1)),
        conversation("moves?", clip(2)),
    ]
    answerer = answerer_of(tmp_path, budget=6, dtype="float32")
    together = answerer.answers(questions, GREEDY)
    assert together == [answerer.answers([question], GREEDY)[0] for question in questions]
    assert len({answer.text for answer in together}) == len(questions)


def test_an_answer_ends_at_the_end_token_of_the_template_too(tmp_path):
    model, processor = tiny.llava(), tiny.processor()
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    save_base(tmp_path, model, processor, chatml("kind"))

    answerer = answerer_of(tmp_path, budget=6)
    answerer.comparison.family.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([end]), 99.0)
    )
    (answer,) = answerer.answers([conversation("what?", image(0))], GREEDY)
    assert (answer.text, answer.num_tokens) == ("", 1)


def test_pictures_may_come_as_paths(answerer, tmp_path):
    tiny.picture(3).save(tmp_path / "3.png")
    path = conversation("what?", {"type": "image", "url": str(tmp_path / "3.png")})
    same = conversation("what?", image(3))
    assert answerer.answers([path], GREEDY) == answerer.answers([same], GREEDY)


def test_a_video_by_its_path_is_the_frames_that_training_takes(tmp_path):
    save_base(tmp_path / "model", tiny.llava("video"), tiny.processor("video"), vicuna())
    answerer = answerer_of(tmp_path / "model", budget=6, dtype="float32", num_frames=2)
    frames = tiny.video(1, 5)
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{number}.png")

    path = conversation("moves?", {"type": "video", "url": str(tmp_path / "clip")})
    same = conversation("moves?", {"type": "video", "url": [frames[0], frames[-1]]})
    assert answerer.answers([path], GREEDY) == answerer.answers([same], GREEDY)

    cut_video = conversation("moves?", {"type": "video", "url": {"video_path": "a", "end": 3}})
    refused(answerer.answers, [cut_video], GREEDY, words=["parts of videos are not supported"])


def test_answers_are_sampled_only_with_a_temperature(answerer):
    questions = [conversation("what?", image(0))] * 8
    sampled = answerer.answers(questions, {"max_new_tokens": 5, "temperature": 5.0, "do_sample": True})
    greedy = answerer.answers(questions, {"max_new_tokens": 5, "temperature": 0})
    assert len({answer.text for answer in sampled}) > 1
    assert len({answer.text for answer in greedy}) == 1


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        (" a\n\nb ", ["\n\n"], "a"),
        ("a", None, "a"),
        ("a END b", "END", "a"),
        ("ab", ["", "b"], "a"),
        ("aXbY", ["Y", "X"], "a"),
    ],
)
def test_an_answer_is_cut_before_the_first_of_its_ends(text, until, expected):
    assert cut(text, until) == expected
