"""A conversation with its cache kept says what one without a cache says, and encodes the picture once."""

from contextlib import contextmanager

import pytest
import torch

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.chat import Chat
from vzip.templates.encode import chatml, vicuna
from vzip.templates.jinja import chat_template

REDUCERS = {
    "full": {"reducer": vzip.reducers.identity.Identity()},
    "reduced": {"dominant": 4, "contextual": 3},
}
QUESTIONS = ("what is it?", "and where?", "why so?")


def attached(kind, **reducer):
    """(handle, its processor with a chat template) of a tiny model that does not end its answers at once."""
    handle = vzip.attach(tiny.llava(kind), **reducer)
    processor = handle.processor(tiny.processor(kind))
    processor.chat_template = chat_template(vicuna("s "), processor.tokenizer)
    return handle, processor


def ask(chat, question):
    *parts, answer = chat.ask(question)
    assert [part.text for part in parts] == sorted((part.text for part in parts), key=len) and parts[
        -1
    ].text == answer.text
    return answer


def without_cache(chat, num_tokens):
    """What `generate` answers to the conversation but its last answer, all of it run anew."""
    text = chat.processor.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True)
    inputs = chat.processor(text=text, images=[chat.picture], return_tensors="pt")
    end = chat.processor.tokenizer.eos_token_id
    limits = {
        "max_new_tokens": num_tokens,
        "do_sample": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": end,
    }
    output = chat.model.generate(**inputs, **limits)[0, inputs["input_ids"].shape[1] :]
    return chat.processor.tokenizer.decode(output, skip_special_tokens=True).strip()


@contextmanager
def counted(handle):
    """The pictures that the tower encodes in the block, one entry a call."""
    calls = []
    hook = handle.family.tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_turns_are_those_of_a_run_without_cache_and_the_picture_is_encoded_once(kind, reducer):
    handle, processor = attached(kind, **REDUCERS[reducer])
    chat = Chat(handle.family.model, processor, tiny.picture(1, 90, 60), max_new_tokens=6)
    with counted(handle) as calls:
        answers = [ask(chat, question) for question in QUESTIONS]
    assert len(calls) == 1
    for turn, answer in enumerate(answers):
        part = Chat(handle.family.model, processor, tiny.picture(1, 90, 60))
        part.messages = chat.messages[: 2 * turn + 2]
        assert answer.text == without_cache(part, 6)
    visual = handle.num_image_tokens((90, 60))
    assert {answer.num_visual_tokens for answer in answers} == {visual}
    assert (
        answers[0].num_cached_tokens
        == 0
        < visual
        < answers[1].num_cached_tokens
        < answers[2].num_cached_tokens
    )
    assert all(answer.num_prompt_tokens - answer.num_cached_tokens < 60 for answer in answers[1:])


def test_an_answer_says_what_it_took():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    chat = Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5)
    answer = ask(chat, "what?")
    prompt = processor.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True)
    assert answer.num_prompt_tokens == len(processor(text=prompt, images=[tiny.picture()])["input_ids"][0])
    assert answer.seconds_to_first_token > 0 and answer.tokens_per_second > 0
    bytes_a_token = 2 * 2 * 2 * 12 * 4  # keys and values, layers, key heads, width of a head, float32
    assert answer.cache_bytes == bytes_a_token * (answer.num_prompt_tokens + 4)  # the last token was not run


def test_an_answer_ends_at_the_templates_end_token_as_well_as_the_models():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    processor.chat_template = chat_template(chatml("s"), processor.tokenizer)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5)
    assert end != processor.tokenizer.eos_token_id
    with torch.no_grad():
        handle.family.lm_head.weight.zero_()  # every token is as likely, and the first one is taken
    assert ask(chat, "what?").text == ""  # 5 times <unk>
    handle.family.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([end]), 9.0)
    )
    assert [answer.text for answer in chat.ask("what?")] == [""]
    assert chat.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": ""}]}


def test_text_that_changed_behind_the_picture_is_run_again():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    chat = Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5)
    ask(chat, "what?")
    chat.messages[1]["content"][0]["text"] = "no, another answer"
    with counted(handle) as calls:
        answer = ask(chat, "why?")
    first = processor.apply_chat_template(chat.messages[:1], tokenize=False, add_generation_prompt=True)
    shared = len(processor(text=first + " ", images=[tiny.picture()])["input_ids"][0])
    assert calls == [] and answer.num_cached_tokens in (
        shared - 1,
        shared,
    )  # the answer may have begun with a space, too
    assert answer.text == without_cache(chat, 5)


def test_text_that_changed_before_the_picture_makes_everything_run_again():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    chat = Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5)
    ask(chat, "what?")
    processor.chat_template = chat_template(vicuna("another system "), processor.tokenizer)
    with counted(handle) as calls:
        answer = ask(chat, "why?")
    assert len(calls) == 1 and answer.num_cached_tokens == 0
    assert answer.text == without_cache(chat, 5)


def test_a_turn_that_is_broken_off_leaves_the_conversation_as_it_was():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    chat, other = (Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5) for _ in range(2))
    for each in (chat, other):
        ask(each, "what?")
    unfinished = chat.ask("is this left?")
    next(unfinished)
    unfinished.close()
    assert ask(chat, "why?").text == ask(other, "why?").text
    assert chat.messages == other.messages


def test_a_turn_that_fails_leaves_no_half_written_cache():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    chat, other = (Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5) for _ in range(2))
    for each in (chat, other):
        ask(each, "what?")

    def fail(module, args):
        raise MemoryError

    hook = handle.family.language_model.layers[1].register_forward_pre_hook(
        fail
    )  # layer 0 has the new keys already
    with pytest.raises(MemoryError):
        ask(chat, "why?")
    hook.remove()
    assert ask(chat, "why?").text == ask(other, "why?").text


def test_what_can_not_be_asked_is_refused():
    handle, processor = attached("clip", **REDUCERS["reduced"])
    chat = Chat(handle.family.model, processor, tiny.picture(), max_new_tokens=5)
    for question, words in (
        ("  ", "is empty"),
        ("an <image>?", "spells <image>"),
        ("a" * 2048, "the model takes 2048"),
    ):
        with pytest.raises(UserError, match=words):
            ask(chat, question)
    assert chat.messages == []
    processor.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Chat(handle.family.model, processor, tiny.picture())
