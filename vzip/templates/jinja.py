"""A template of the recipe as a Jinja chat template of `transformers`.

With it, a loaded model gets its prompts in the format that it was tuned with.
"""

import re
from typing import Any

from vzip.errors import UserError
from vzip.templates.encode import Template

_CHAT_TEMPLATE = """\
{{ OPENING }}\
{% for message in messages %}\
{% set content = message.content %}\
{% if message.role == 'user' %}\
{{ USER }}\
{% if content is string %}\
{{ content }}\
{% else %}\
{% for part in content if part.type == 'image' %}{{ IMAGE_LINE }}{% endfor %}\
{% for part in content if part.type == 'video' %}{{ VIDEO_LINE }}{% endfor %}\
{{ TEXT_LINES }}\
{% endif %}\
{{ ASSISTANT }}\
{% elif message.role == 'assistant' %}\
{{ ANSWER_PREFIX }}\
{% if content is string %}{{ content }}{% else %}{{ TEXT_LINES }}{% endif %}\
{{ ANSWER_END }}\
{% else %}\
{{ raise_exception('this template takes the roles user and assistant, and has its own system prompt') }}\
{% endif %}\
{% endfor %}"""
"""The names in capitals stand for Jinja expressions, which `chat_template` puts in."""

_TEXT_LINES = "content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n')"


def _literal(text: str) -> str:
    """Write any text as a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _space_after_token(tokenizer: Any) -> str:
    """Return the space that text after a token needs to get the ids that it has by itself.

    Training tokenizes such text by itself. The space is empty unless the tokenizer puts one before
    the start of a text, and nowhere else.
    """
    # Compare text after a token with the same text by itself.
    token: str = tokenizer.bos_token or tokenizer.eos_token
    ids: list[int] = tokenizer.encode(token + "a", add_special_tokens=False)[1:]
    return "" if ids == tokenizer.encode("a", add_special_tokens=False) else " "


def chat_template(template: Template, tokenizer: Any) -> str:
    """Write a template as Jinja text, which makes the prompts of `vzip.templates.encode.encode`.

    A message's content is a string, or a list of parts of the types "image", "video" and "text".
    Pictures and videos go to the front, each followed by `media_end`, as in training. Each part of
    text begins a new line: evaluation harnesses cut a question at its pictures, and leave the text
    between the pieces to the template.

    Raises:
        UserError: the template takes captions, which are not conversations.
    """
    if template.captions:
        raise UserError(
            f"the {template.name!r} template takes captions, so it can't be used to chat; "
            "choose a model.template for conversations"
        )

    # In training, text after a placeholder is tokenized by itself.
    space = _space_after_token(tokenizer)

    # Write the BOS token only if the tokenizer does not add it to a text: two of them would change
    # the answers.
    opening = template.system
    tokenizer_adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if template.adds_bos and not tokenizer_adds_bos:
        opening = tokenizer.bos_token + space + opening

    image = template.image_text or "".join(template.image)
    expressions = {
        "OPENING": _literal(opening),
        "USER": _literal(template.user),
        "IMAGE_LINE": _literal(image + space + template.media_end),
        "VIDEO_LINE": _literal("".join(template.video) + space + template.media_end),
        "TEXT_LINES": _TEXT_LINES,
        "ASSISTANT": _literal(template.assistant),
        "ANSWER_PREFIX": _literal(template.answer_prefix),
        "ANSWER_END": _literal(template.answer_suffix + template.end + template.separator),
    }
    # Put all expressions in at once: a text of the template that spells a name must stay a text.
    return re.sub(
        r"{{ ([A-Z_]+) }}",
        lambda name: f"{{{{ {expressions[name[1]]} }}}}",
        _CHAT_TEMPLATE,
    )
