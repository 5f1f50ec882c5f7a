"""A conversation that keeps its cache says what one without a cache says, and encodes the picture once."""

from contextlib import contextmanager

import pytest
import torch

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.chat import Chat
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import chatml, vicuna
from vzip.templates.jinja import chat_template

pytestmark = pytest.mark.slow

REDUCED = VisionZip(dominant=4, contextual=3)
QUESTIONS = ("what is it?", "and where?", "why so?")


def attached_with_template(kind="clip", reducer=REDUCED):
    """(handle, processor with a chat template) of a tiny model that does not end its answers at once."""
    handle = vzip.attach(tiny.llava(kind), reducer=reducer)
    processor = handle.processor(tiny.processor(kind))
    processor.chat_template = chat_template(vicuna("s "), processor.tokenizer)
    return handle, processor


@pytest.fixture
def model():
    """(handle, processor) of a reduced model."""
    return attached_with_template()


def chat_with(handle, processor, picture=None):
    return Chat(handle.family.model, processor, picture or tiny.picture(), max_new_tokens=5)


def ask(chat, question):
    """The complete answer; each beginning is longer than the one before."""
    *beginnings, answer = chat.ask(question)
    texts = [beginning.text for beginning in beginnings]
    assert texts == sorted(texts, key=len) and texts[-1] == answer.text
    return answer


def prompt_of(chat, messages):
    return chat.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def assert_as_without_cache(chat, num_messages=None):
    """The last of the messages is what `generate` answers to those before, all of them run anew."""
    *messages, answer = chat.messages[:num_messages]
    inputs = chat.processor(text=prompt_of(chat, messages), images=[chat.picture], return_tensors="pt")
    output = chat.model.generate(
        **inputs,
        max_new_tokens=chat.max_new_tokens,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=chat.processor.tokenizer.eos_token_id,
    )
    new_ids = output[0, inputs["input_ids"].shape[1] :]
    expected = chat.processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
    assert answer["content"][0]["text"] == expected


@contextmanager
def tower_calls(handle):
    """The pictures that the tower encodes in the block, one entry for each call."""
    calls = []
    hook = handle.family.tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("reducer", [Identity(), REDUCED], ids=["full", "reduced"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_turns_are_those_without_a_cache_and_the_picture_is_encoded_once(kind, reducer):
    handle, processor = attached_with_template(kind, reducer)
    chat = chat_with(handle, processor, tiny.picture(1, 90, 60))
    with tower_calls(handle) as calls:
        first, second, third = (ask(chat, question) for question in QUESTIONS)
    assert len(calls) == 1
    for num_messages in (2, 4, 6):
        assert_as_without_cache(chat, num_messages)

    num_visual_tokens = handle.num_image_tokens((90, 60))
    assert {answer.num_visual_tokens for answer in (first, second, third)} == {num_visual_tokens}
    assert first.num_cached_tokens == 0
    assert num_visual_tokens < second.num_cached_tokens < third.num_cached_tokens
    for answer in (second, third):
        assert answer.num_prompt_tokens - answer.num_cached_tokens < 60


def test_an_answer_says_what_it_took(model):
    _, processor = model
    chat = chat_with(*model)
    answer = ask(chat, "what?")
    prompt = prompt_of(chat, chat.messages[:-1])
    assert answer.num_prompt_tokens == len(processor(text=prompt, images=[tiny.picture()])["input_ids"][0])
    assert answer.seconds_to_first_token > 0 and answer.tokens_per_second > 0
    # Keys and values, layers, key heads, width of a head, float32. The last token was not run.
    assert answer.cache_bytes == 2 * 2 * 2 * 12 * 4 * (answer.num_prompt_tokens + 4)


def test_an_answer_ends_at_the_end_token_of_the_template_too(model):
    handle, processor = model
    processor.chat_template = chat_template(chatml("s"), processor.tokenizer)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != processor.tokenizer.eos_token_id
    chat = chat_with(handle, processor)
    handle.family.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([end]), 99.0)
    )
    assert [answer.text for answer in chat.ask("what?")] == [""]
    assert chat.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": ""}]}


@pytest.mark.parametrize("kind", ["clip", *tiny.NATIVE])
def test_conversations_that_share_a_model_do_not_change_each_other(kind):
    pictures = [tiny.picture(1, 90, 60), tiny.picture(2, 40, 200)]
    handle, processor = attached_with_template(kind)
    alone = []
    for picture in pictures:
        chat = chat_with(handle, processor, picture)
        alone.append([ask(chat, question).text for question in QUESTIONS])

    chats = [chat_with(handle, processor, picture) for picture in pictures]
    in_turns = [[ask(chat, question).text for chat in chats] for question in QUESTIONS]
    assert [list(texts) for texts in zip(*in_turns, strict=True)] == alone


def test_text_that_changed_behind_the_picture_is_run_again(model):
    chat = chat_with(*model)
    ask(chat, "what?")
    chat.messages[1]["content"][0]["text"] = "no, another answer"
    with tower_calls(model[0]) as calls:
        answer = ask(chat, "why?")

    first = prompt_of(chat, chat.messages[:1]) + " "
    num_shared = len(chat.processor(text=first, images=[tiny.picture()])["input_ids"][0])
    # The first answer may have begun with a space too.
    assert calls == [] and answer.num_cached_tokens in (num_shared - 1, num_shared)
    assert_as_without_cache(chat)


def test_text_that_changed_before_the_picture_makes_everything_run_again(model):
    handle, processor = model
    chat = chat_with(handle, processor)
    ask(chat, "what?")
    processor.chat_template = chat_template(vicuna("another system "), processor.tokenizer)
    with tower_calls(handle) as calls:
        answer = ask(chat, "why?")
    assert len(calls) == 1 and answer.num_cached_tokens == 0
    assert_as_without_cache(chat)


def test_a_turn_that_is_broken_off_leaves_the_conversation_as_it_was(model):
    chat = chat_with(*model)
    ask(chat, "what?")
    unfinished = chat.ask("is this left?")
    next(unfinished)
    unfinished.close()
    ask(chat, "why?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert_as_without_cache(chat)


def test_a_turn_that_fails_leaves_no_half_written_cache(model):
    chat = chat_with(*model)
    ask(chat, "what?")

    def fail(module, args):
        raise MemoryError

    # Layer 0 has the new keys by then.
    hook = model[0].family.language_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        ask(chat, "why?")
    hook.remove()
    ask(chat, "why?")
    assert_as_without_cache(chat)


def test_what_can_not_be_asked_is_refused(model):
    handle, processor = model
    chat = chat_with(handle, processor)
    refused(ask, chat, "  ", words=["is empty"])
    refused(ask, chat, "why \ud83d?", words=["half of a surrogate pair"])
    refused(ask, chat, "an <image>?", words=["spells <image>"])
    refused(ask, chat, "a" * 2048, words=["the model takes 2048"])
    assert chat.messages == []
    processor.chat_template = None
    refused(chat_with, handle, processor, words=["has no chat template"])
