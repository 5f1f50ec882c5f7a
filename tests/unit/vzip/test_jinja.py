"""Chat templates of transformers give the same prompts as the recipe's templates."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import LlamaTokenizer

from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.templates.encode import chatml, encode, mistral, plain, vicuna
from vzip.templates.jinja import chat_template

TEMPLATES = {
    "vicuna": vicuna(),
    "mistral": mistral(),
    "chatml": chatml("You're \\ 's \n {{ x }} {{ USER }}"),
}
TURNS = [
    ("<image>\n<image>\nwhich {% is %} it's?", 'a "cat"'),
    ("and\nnow?", "it's {{ two }}"),
    ("why?", None),
]


def text(value):
    return {"type": "text", "text": value}


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, text("which {% is %} it's?"), {"type": "image"}]},
    {"role": "assistant", "content": 'a "cat"'},
    {"role": "user", "content": "and\nnow?"},
    {"role": "assistant", "content": [text("it's {{ two }}")]},
    {"role": "user", "content": "why?"},
]


def rendered(template, tokenizer, messages):
    tokenizer.chat_template = chat_template(template, tokenizer)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_ids_of_the_training_format(name):
    tokenizer = tiny.tokenizer()
    prompt = rendered(TEMPLATES[name], tokenizer, MESSAGES)
    assert tokenizer(prompt)["input_ids"] == encode(TEMPLATES[name], tokenizer, TURNS)[0]


def test_each_part_of_text_begins_a_line():
    """lmms-eval's MMMU cuts a question at its pictures, and strips the pieces."""
    content = [text("what is in"), {"type": "image"}, text("and why?")]
    prompt = rendered(vicuna(), tiny.tokenizer(), [{"role": "user", "content": content}])
    assert "<image>\nwhat is in\nand why? ASSISTANT:" in prompt


@pytest.mark.parametrize("build", [vicuna, mistral])
@pytest.mark.parametrize("legacy", [True, False])
def test_prompts_for_a_sentencepiece_tokenizer_have_the_ids_of_training(build, legacy, sentencepiece_folder):
    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, legacy=legacy)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    messages = [
        {"role": "user", "content": [{"type": "image"}, text("what?")]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "why?"},
    ]
    ids = tokenizer(rendered(build(), tokenizer, messages))["input_ids"]
    assert ids == encode(build(), tokenizer, [("<image>\nwhat?", "a cat"), ("why?", None)])[0]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_other_roles_and_captions_are_refused():
    tokenizer = tiny.tokenizer()
    with pytest.raises(TemplateError, match="has its own system prompt"):
        rendered(vicuna(), tokenizer, [{"role": "system", "content": "be kind"}])
    refused(chat_template, plain(), tokenizer, words=["'plain' template takes captions"])
