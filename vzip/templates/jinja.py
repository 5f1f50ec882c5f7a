"""A template of the recipe as a Jinja chat template of `transformers`, so that a loaded model is asked as it was tuned."""

from typing import Any

from vzip.errors import UserError
from vzip.templates.encode import IMAGE, VIDEO, Template


def _literal(text: str) -> str:
    """A Jinja string of any text."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _space(tokenizer: Any) -> str:
    """What text behind a token needs so that it is tokenized as by itself, as in training: a space, where only the start of a
    text gets one.
    """
    token: str = tokenizer.bos_token or tokenizer.eos_token
    behind: list[int] = tokenizer.encode(token + "a", add_special_tokens=False)[1:]
    return "" if behind == tokenizer.encode("a", add_special_tokens=False) else " "


def chat_template(template: Template, tokenizer: Any) -> str:
    """The Jinja text of a template: the same conversation as `vzip.templates.encode.run_vision_tower` makes.

    A message's content is a string, or a list of parts of the types "image", "video" and "text"; pictures go to the front, each
    followed by a newline, as in training. Of several parts of text each begins a new line: whoever cuts a question at its
    pictures leaves what stood between the pieces to the template. A BOS is written where the tokenizer does not do so itself.

    Raises:
        UserError: a template of captions, which are no conversation.
    """
    if template.captions:
        raise UserError(
            f"the {template.name!r} template is one of captions: it has no chat; choose a model.template that has"
        )
    space = _space(tokenizer)
    has_bos = not template.adds_bos or tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    opening = ("" if has_bos else tokenizer.bos_token + space) + template.system
    answer = (_literal(template.answer_prefix), _literal(template.answer_suffix + template.end))
    media = "".join(
        f"{{% for part in content if part.type == '{kind}' %}}{{{{ {_literal(token + space + chr(10))} }}}}{{% endfor %}}"
        for kind, token in (("image", IMAGE), ("video", VIDEO))
    )
    text = (
        f"content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join({_literal(chr(10))})"
    )
    return (
        f"{{{{ {_literal(opening)} }}}}"
        "{% for message in messages %}{% set content = message.content %}"
        "{% if message.role == 'user' %}"
        f"{{{{ {_literal(template.user)} }}}}"
        f"{{% if content is string %}}{{{{ content }}}}{{% else %}}{media}{{{{ {text} }}}}{{% endif %}}"
        f"{{{{ {_literal(template.assistant)} }}}}"
        "{% elif message.role == 'assistant' %}"
        f"{{{{ {answer[0]} }}}}"
        f"{{% if content is string %}}{{{{ content }}}}{{% else %}}{{{{ {text} }}}}{{% endif %}}"
        f"{{{{ {answer[1]} + {_literal(template.separator)} }}}}"
        "{% else %}{{ raise_exception('this template has roles user and assistant; its system prompt is its own') }}{% endif %}"
        "{% endfor %}"
    )
