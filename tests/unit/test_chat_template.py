"""Chat templates of transformers say what the recipe's templates say."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import LlamaTokenizer

from tests.helpers import tiny
from vzip import UserError
from vzip.templates.encode import chatml, encode, mistral, plain, vicuna
from vzip.templates.jinja import chat_template

TEMPLATES = {"vicuna": vicuna(), "mistral": mistral(), "chatml": chatml("You're \\ 's \n {{ x }}")}
TURNS = [
    ("<image>\n<image>\nwhich {% is %} it's?", 'a "cat"'),
    ("and\nnow?", "it's {{ two }}"),
    ("why?", None),
]
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "which {% is %} it's?"}, {"type": "image"}],
    },
    {"role": "assistant", "content": 'a "cat"'},
    {"role": "user", "content": "and\nnow?"},
    {"role": "assistant", "content": [{"type": "text", "text": "it's {{ two }}"}]},
    {"role": "user", "content": "why?"},
]


def rendered(template, tokenizer, messages):
    tokenizer.chat_template = chat_template(template, tokenizer)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_ids_of_the_training_format(name):
    tokenizer, template = tiny.tokenizer(), TEMPLATES[name]
    text = rendered(template, tokenizer, MESSAGES)
    assert tokenizer(text)["input_ids"] == encode(template, tokenizer, TURNS)[0]


def test_parts_of_text_are_lines():
    """As lmms-eval's MMMU gives them, whose pieces around a picture are stripped."""
    tokenizer = tiny.tokenizer()
    content = [
        {"type": "text", "text": "what is in"},
        {"type": "image"},
        {"type": "text", "text": "and why?"},
    ]
    whole = [{"type": "image"}, {"type": "text", "text": "what is in\nand why?"}]
    parts, text = (
        rendered(vicuna(), tokenizer, [{"role": "user", "content": each}]) for each in (content, whole)
    )
    assert parts == text and "<image>\nwhat is in\nand why? ASSISTANT:" in parts


@pytest.mark.parametrize("build", [vicuna, mistral])
@pytest.mark.parametrize("legacy", [True, False])
def test_prompts_of_a_real_sentencepiece_tokenizer_are_the_training_formats(
    build, legacy, sentencepiece_folder
):
    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, legacy=legacy)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    messages = [question, {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "why?"}]
    ids = tokenizer(rendered(build(), tokenizer, messages))["input_ids"]
    assert ids == encode(build(), tokenizer, [("<image>\nwhat?", "a cat"), ("why?", None)])[0]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_other_roles_and_captions_are_refused():
    tokenizer = tiny.tokenizer()
    with pytest.raises(TemplateError, match="its system prompt is its own"):
        rendered(vicuna(), tokenizer, [{"role": "system", "content": "be kind"}])
    with pytest.raises(UserError, match="'plain' template is one of captions"):
        chat_template(plain(), tokenizer)
