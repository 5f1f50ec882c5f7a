"""Conversation templates: from turns of text to token ids and labels, built piece by piece.

Each piece is tokenized by itself, as the text that follows the piece before it. So the boundary
between a question and an answer is split as in the model's own training, and labels need no
counting of characters. Source of the Vicuna format: repository haotian-liu/LLaVA,
`llava/conversation.py` (`conv_vicuna_v1`) and `llava/train/train.py` (`preprocess_v1`).

A control token (`</s>`, `<|im_end|>`, ...) is set by its id, and only where the template writes it.
A question or an answer that spells one holds ordinary text, like `USER:` and `[INST]`: no example
can end its own turn or open another one. LLaVA's code takes such spellings for the tokens, and then
masks the whole example with a "tokenization mismatch".

`<image>` and `<video>` are placeholders in a question, and text in an answer. The reader of the
data checks that a question has as many placeholders as the example has media.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vzip.errors import UserError

IMAGE = "<image>"
VIDEO = "<video>"

IGNORED = -100
"""The label of a token without loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The texts around system prompt, questions and answers.

    A conversation is written as
    `bos system [user QUESTION assistant | answer_prefix ANSWER answer_suffix end | separator]...`.
    The loss is on what stands between the bars: the answer with what is written around it, and its
    end token.
    """

    name: str
    system: str = ""
    user: str
    assistant: str
    answer_prefix: str = ""
    answer_suffix: str = ""
    end: str
    """The token that ends an answer; "" if an answer ends with `answer_suffix` alone."""
    separator: str = ""
    controls: tuple[str, ...] = ()
    """Tokens that `system`, `user` and `assistant` spell."""
    adds_bos: bool = False
    captions: bool = False
    """Whether a conversation is one caption, and its question keeps only the placeholders."""


# Ids of one piece of text


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize `text` by itself. Control tokens that it spells are text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def _ids_after(tokenizer: Any, anchor: str, text: str) -> list[int]:
    """Tokenize `text` as it stands after the text `anchor`; an empty anchor is the start of a text.

    A SentencePiece tokenizer puts a space before a text, but not in the middle of one.
    """
    if not anchor:
        return _ids(tokenizer, text)

    # Tokenize both together, and take away the anchor's own ids. This works only if no token spans
    # the boundary.
    anchor_ids = _ids(tokenizer, anchor)
    ids = _ids(tokenizer, anchor + text)
    if ids[: len(anchor_ids)] != anchor_ids:
        raise UserError(
            f"the tokenizer joins {anchor!r} and {text[:40]!r}; this template does not fit the tokenizer"
        )
    return ids[len(anchor_ids) :]


def _anchor_after(tokenizer: Any, control: str) -> str:
    """Find the anchor with which `_ids_after` tokenizes text as it stands after a control token.

    Most tokenizers treat it as the start of a text, for which the anchor is empty. A SentencePiece
    tokenizer that is not "legacy" puts no space before it. It does not put one after a newline
    either, which is a token of its own and never joins with what follows.
    """
    # Compare "a" after the control token, whose own id is the first, with "a" by itself.
    ids: list[int] = tokenizer.encode(control + "a", add_special_tokens=False)[1:]
    return "" if ids == _ids(tokenizer, "a") else "\n"


def _token_id(tokenizer: Any, token: str, error: str) -> int:
    """Look up a token. Raises UserError with the message `error` if the tokenizer lacks it."""
    # Tokenizers return None or the id of the unknown token.
    token_id: int | None = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
        raise UserError(error)
    return token_id


def _control_id(template: Template, tokenizer: Any, control: str) -> int:
    error = (
        f"the {template.name!r} template writes {control}, which this model's tokenizer does not "
        "know; choose the model.template that the model was trained with"
    )
    return _token_id(tokenizer, control, error)


def _split(text: str, tokens: Sequence[str]) -> tuple[str, Iterator[tuple[str, str]]]:
    """Cut `text` at the tokens that it spells. Returns the text before, and (token, text) pairs."""
    if not tokens:
        return text, iter(())

    # re.split keeps what a group matches: text, token, text, token, ..., text.
    pattern = "|".join(re.escape(token) for token in tokens)
    first, *rest = re.split(f"({pattern})", text)
    return first, zip(rest[::2], rest[1::2], strict=True)


def _text_ids(tokenizer: Any, text: str, anchor: str) -> list[int]:
    """Tokenize text that stands after `anchor`, with one id for each `<image>` and `<video>`.

    The text on both sides of a placeholder is tokenized by itself, as in LLaVA
    (`tokenizer_image_token`).
    """
    first, rest = _split(text, (IMAGE, VIDEO))
    ids = _ids_after(tokenizer, anchor, first)
    for placeholder, chunk in rest:
        error = (
            f"a question has {placeholder}, which this model's tokenizer does not know; remove such examples"
        )
        ids.append(_token_id(tokenizer, placeholder, error))
        ids += _ids(tokenizer, chunk)
    return ids


# Ids of questions and answers


def place_media(question: str) -> str:
    """Move a question's placeholders to its front, images first, each followed by a newline.

    For images this is LLaVA's preprocessing (`preprocess_multimodal`). Video-LLaVA's moves nothing:
    its data starts with `<video>` and a newline already. Only its few examples with both kinds have
    the videos before the images.
    """
    front = (IMAGE + "\n") * question.count(IMAGE) + (VIDEO + "\n") * question.count(VIDEO)
    if not front:
        return question

    # White space is stripped as in LLaVA's code, also around a text that was in the right order.
    text = question.replace(IMAGE, "").replace(VIDEO, "").strip()
    return (front + text).strip()


def _placeholders_alone(template: Template, question: str) -> str:
    """Drop a question's text, as in LLaVA's first stage. Raises UserError without a placeholder."""
    placeholders = IMAGE * question.count(IMAGE) + VIDEO * question.count(VIDEO)
    if not placeholders:
        raise UserError(
            f"the {template.name!r} template takes captions of pictures, but the question "
            f"{question[:40]!r} has no {IMAGE}; remove such examples, or choose a model.template "
            "for conversations"
        )
    return placeholders


def _prompt_ids(
    template: Template,
    tokenizer: Any,
    question: str,
    *,
    before: str,
    anchor: str,
    control_anchor: str,
) -> list[int]:
    """Tokenize a question with what the template writes around it.

    Args:
        template: the conversation's template.
        tokenizer: the model's tokenizer.
        question: the question. Control tokens that it spells are ordinary text.
        before: text of the template before this turn: the system prompt or the separator.
        anchor: the anchor of `before`.
        control_anchor: the anchor of text after a control token.
    """
    if template.captions:
        question = _placeholders_alone(template, question)
    else:
        question = place_media(question)

    # Cut the template's own texts at its control tokens, then put the question between them.
    first, pairs_before = _split(before + template.user, template.controls)
    text_after, pairs_after = _split(template.assistant, template.controls)
    texts = [first]
    controls = []
    for control, text in pairs_before:
        controls.append(control)
        texts.append(text)
    texts[-1] += question + text_after
    for control, text in pairs_after:
        controls.append(control)
        texts.append(text)

    # Control tokens get their ids; all text between them stays text.
    ids = _text_ids(tokenizer, texts[0], anchor)
    for control, text in zip(controls, texts[1:], strict=True):
        ids.append(_control_id(template, tokenizer, control))
        ids += _text_ids(tokenizer, text, control_anchor)
    return ids


def _answer_ids(template: Template, tokenizer: Any, answer: str) -> list[int]:
    """Tokenize an answer with its prefix, its suffix and its end token."""
    # A prefix is a space, which follows the last word of the prompt. Any word can be the anchor.
    anchor = "a" if template.answer_prefix else ""
    text = template.answer_prefix + answer + template.answer_suffix
    ids = _ids_after(tokenizer, anchor, text)
    if template.end:
        ids.append(_control_id(template, tokenizer, template.end))
    return ids


def _check_turns(template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]) -> None:
    """Raise UserError if a BOS token is missing, or a caption has several turns."""
    if template.adds_bos and tokenizer.bos_token_id is None:
        raise UserError(
            f"the {template.name!r} template starts with a BOS token, "
            "but this model's tokenizer has none; choose another model.template"
        )
    if template.captions and len(turns) != 1:
        raise UserError(
            f"the {template.name!r} template takes one caption per example, not {len(turns)} turns; "
            "remove such examples"
        )


def encode(
    template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[int]]:
    """Make token ids and labels of a conversation.

    Each `<image>` and `<video>` is one id; nothing is expanded yet.

    Args:
        template: the model's training format.
        tokenizer: the model's tokenizer. It must know the template's tokens, and the placeholders
            of the questions.
        turns: (question, answer) pairs. None as the last answer ends the ids where generation
            starts.

    Returns:
        ids and labels of equal length. Labels are `IGNORED` except on answers, with their prefix
        and suffix, and on their end tokens.

    Raises:
        UserError: the template does not fit the tokenizer, the tokenizer does not know a token, or
            the template takes captions and the conversation is not one.
    """
    _check_turns(template, tokenizer, turns)

    # Text after a control token may need another space than text at the start, so find out once.
    ids = [tokenizer.bos_token_id] if template.adds_bos else []
    labels = [IGNORED] * len(ids)
    control_anchor = _anchor_after(tokenizer, template.end) if template.end else ""

    # The system prompt comes before the first question, the separator before every other one.
    before = template.system
    anchor = ""
    for question, answer in turns:
        prompt_ids = _prompt_ids(
            template,
            tokenizer,
            question,
            before=before,
            anchor=anchor,
            control_anchor=control_anchor,
        )
        ids += prompt_ids
        labels += [IGNORED] * len(prompt_ids)

        # A prompt for generation ends here, where the model writes its answer.
        if answer is None:
            return ids, labels

        # The end token has loss too: the model has to learn where its answer ends.
        answer_ids = _answer_ids(template, tokenizer, answer)
        ids += answer_ids
        labels += answer_ids

        # From now on a question follows the end token of an answer.
        before = template.separator
        anchor = control_anchor

    # A separator also follows the last answer, as in the training of these models.
    separator_ids = _text_ids(tokenizer, template.separator, control_anchor)
    return ids + separator_ids, labels + [IGNORED] * len(separator_ids)


# The templates

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def vicuna(system: str = VICUNA_SYSTEM) -> Template:
    """Vicuna v1: `SYSTEM USER: question ASSISTANT: answer</s>USER: ...`.

    LLaVA-1.5 and LLaVA-NeXT with Vicuna use it.
    """
    return Template(
        name="vicuna",
        system=system,
        user="USER: ",
        assistant=" ASSISTANT:",
        answer_prefix=" ",
        end="</s>",
        adds_bos=True,
    )


def mistral() -> Template:
    """Mistral's instructions: `[INST] question [/INST] answer </s>[INST] ...`.

    LLaVA-NeXT with Mistral uses it. Source: repository haotian-liu/LLaVA, `llava/conversation.py`
    (`conv_mistral_instruct`, whose LLAMA_2 style writes a space on both sides of an answer) and
    `llava/train/train.py` (`preprocess_llama_2`).
    """
    return Template(
        name="mistral",
        user="[INST] ",
        assistant=" [/INST]",
        answer_prefix=" ",
        answer_suffix=" ",
        end="</s>",
        adds_bos=True,
    )


def chatml(system: str) -> Template:
    """ChatML with the system prompt `system`, which Qwen2 and SmolLM2 use.

    The ids are those of repository LLaVA-VL/LLaVA-NeXT, `llava/train/train.py` (`preprocess_qwen`).
    Two things differ. That function also puts loss on the assistant's header, on the newline after
    an answer, and on each `<|im_start|>`, `<|im_end|>` and newline of a prompt. Here the loss is on
    the answer and its `<|im_end|>`, as in the other templates. And it leaves several images of a
    question in place; here they go to the front (`place_media`).
    """
    return Template(
        name="chatml",
        system=f"<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        separator="\n",
        controls=("<|im_start|>", "<|im_end|>"),
    )


def plain(*, adds_bos: bool = True) -> Template:
    """The format of LLaVA's first stage: `<image>caption` and a newline, which ends the caption.

    Everything else in a question is dropped. The loss is on the caption and its newline. Several
    images of a question follow each other. LLaVA writes a BOS token if the tokenizer has one: set
    `adds_bos` to false for a tokenizer without it, such as Qwen's. Source: repository
    haotian-liu/LLaVA, `llava/conversation.py` (`conv_llava_plain`) and `llava/train/train.py`
    (`preprocess_plain`).
    """
    return Template(
        name="plain",
        user="",
        assistant="",
        answer_suffix="\n",
        end="",
        adds_bos=adds_bos,
        captions=True,
    )
