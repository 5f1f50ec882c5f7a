"""Conversation templates: from turns of text to token ids and labels, built piece by piece.

Each piece is tokenized where it stands, so that no boundary between question and answer can be split differently than in
the model's own training, and labels need no counting of characters. Source of the Vicuna format: repository
haotian-liu/LLaVA, `llava/conversation.py` (`conv_vicuna_v1`) and `llava/train/train.py` (`preprocess_v1`).

A control token (`</s>`, `<|im_end|>`, ...) is set by its id, and only where the template writes it. Spelled in a question or
an answer it is ordinary text, as `USER:` and `[INST]` are: no row can close its own turn or open another one. LLaVA's code
takes such spellings for the tokens, and then masks the whole row with a "tokenization mismatch". `<image>` and `<video>` are
placeholders in a question and text in an answer; that a question has as many as the row has media is checked where it is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vzip.errors import UserError

IMAGE = "<image>"
VIDEO = "<video>"
IGNORED = -100
"""The label of a token that carries no loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """The texts around system prompt, questions and answers.

    A row is `bos system [user QUESTION assistant | answer_prefix ANSWER answer_suffix end | separator]...`; loss is carried
    by the part between the bars: the answer, what is written around it, and its end token.
    """

    name: str
    system: str = ""
    user: str
    assistant: str
    answer_prefix: str = ""
    answer_suffix: str = ""
    end: str
    """The token that ends an answer; "" where nothing but `answer_suffix` does."""
    separator: str = ""
    controls: tuple[str, ...] = ()
    """Tokens that `system`, `user` and `assistant` spell."""
    adds_bos: bool = False
    captions: bool = False
    """Rows are a caption of their pictures: of a question only the placeholders stay, and there is one."""


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` by itself, control tokens that it spells as text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def _ids_after(tokenizer: Any, anchor: str, text: str) -> list[int]:
    """Ids of `text` as it stands after the text `anchor`: a SentencePiece tokenizer puts no space before it there."""
    head, whole = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
    if whole[: len(head)] != head:
        raise UserError(
            f"the tokenizer joins {anchor!r} and {text[:40]!r}; this template does not fit the tokenizer"
        )
    return whole[len(head) :]


def _anchor(tokenizer: Any, control: str) -> str:
    """What `_ids_after` takes for a control token: "" where text after one is tokenized as it is by itself.

    Not so with a SentencePiece tokenizer that is not "legacy": only by itself, text gets a space before it. It gets none
    after a newline either, which is a byte there, and joins nothing.
    """
    behind: list[int] = tokenizer.encode(control + "a", add_special_tokens=False)[1:]
    return "" if behind == _ids(tokenizer, "a") else "\n"


def _split(text: str, tokens: Sequence[str]) -> list[str]:
    """`text` cut at the tokens that it spells: text, token, text, ..., token, text."""
    return re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]


def place_media(question: str) -> str:
    """The question with its placeholders at the front, each followed by a newline: first the images, then the videos.

    For images this is LLaVA's preprocessing (`preprocess_multimodal`). Video-LLaVA's moves nothing: its data starts with
    `<video>` and a newline already, and the few rows with both have the videos before the images.
    """
    front = (IMAGE + "\n") * question.count(IMAGE) + (VIDEO + "\n") * question.count(VIDEO)
    return (front + question.replace(IMAGE, "").replace(VIDEO, "").strip()).strip() if front else question


def _captioned(template: Template, question: str) -> str:
    """The question's placeholders alone, as in LLaVA's first stage. Raises UserError where there are none."""
    placeholders = IMAGE * question.count(IMAGE) + VIDEO * question.count(VIDEO)
    if not placeholders:
        raise UserError(
            f"the {template.name!r} template takes captions of pictures, but the question {question[:40]!r} has no {IMAGE}; "
            f"take such rows out, or choose a model.template of conversations"
        )
    return placeholders


def _token_id(tokenizer: Any, token: str, fault: str) -> int:
    token_id: int | None = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
        raise UserError(fault)
    return token_id


def _control_id(template: Template, tokenizer: Any, control: str) -> int:
    hint = "choose the model.template that the model was trained with"
    fault = (
        f"the {template.name!r} template writes {control}, which this model's tokenizer does not know; {hint}"
    )
    return _token_id(tokenizer, control, fault)


def _text_ids(tokenizer: Any, text: str, anchor: str) -> list[int]:
    """Ids of text that stands after `anchor` ("" for by itself), one id for each `<image>` and `<video>`, in order.

    Around a placeholder every chunk of text is tokenized by itself, as in LLaVA (`tokenizer_image_token`).
    """
    first, *others = _split(text, (IMAGE, VIDEO))
    ids = _ids_after(tokenizer, anchor, first) if anchor else _ids(tokenizer, first)
    for placeholder, chunk in zip(others[::2], others[1::2], strict=True):
        fault = (
            f"a question has {placeholder}, which this model's tokenizer does not know; take such rows out"
        )
        ids += [_token_id(tokenizer, placeholder, fault), *_ids(tokenizer, chunk)]
    return ids


def _prompt_ids(
    template: Template, tokenizer: Any, before: str, question: str, anchors: tuple[str, str]
) -> list[int]:
    """Ids of `before`, a question and what the template writes around it.

    `anchors` are those of the first text, and of text behind a control token.
    """
    *head, left = _split(before + template.user, template.controls)
    right, *tail = _split(template.assistant, template.controls)
    question = _captioned(template, question) if template.captions else place_media(question)
    parts = [*head, left + question + right, *tail]
    first, others = parts[0], parts[1:]
    ids = _text_ids(tokenizer, first, anchors[0])
    for control, text in zip(others[::2], others[1::2], strict=True):
        ids += [_control_id(template, tokenizer, control), *_text_ids(tokenizer, text, anchors[1])]
    return ids


def _answer_ids(template: Template, tokenizer: Any, answer: str) -> list[int]:
    """Ids of an answer with its end: after a prompt's last word where a space leads it, else by itself."""
    prefix, text = template.answer_prefix, answer + template.answer_suffix
    ids = _ids_after(tokenizer, "a", prefix + text) if prefix else _ids(tokenizer, text)
    return [*ids, _control_id(template, tokenizer, template.end)] if template.end else ids


def encode(
    template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, one id for each `<image>` and `<video>`, not yet expanded.

    Args:
        template: the model's training format.
        tokenizer: the model's tokenizer; it must know the template's tokens and the placeholders that the questions have.
        turns: (question, answer) pairs; None as the last answer ends the row where generation starts.

    Returns:
        ids and labels of equal length; labels are `IGNORED` but on answers, with their prefix and suffix, and their end tokens.

    Raises:
        UserError: a tokenizer that the template does not fit, or that does not know a token; for a template of captions,
            a conversation that is none.
    """
    if template.adds_bos and tokenizer.bos_token_id is None:
        raise UserError(
            f"the {template.name!r} template starts with a BOS token, but this model's tokenizer has none"
        )
    if template.captions and len(turns) != 1:
        raise UserError(
            f"the {template.name!r} template takes one caption a row, not {len(turns)} turns; take such rows out"
        )
    ids = [tokenizer.bos_token_id] if template.adds_bos else []
    labels = [IGNORED] * len(ids)
    behind_control = _anchor(tokenizer, template.end) if template.end else ""
    before, anchor = template.system, ""
    for question, answer in turns:
        prompt_ids = _prompt_ids(template, tokenizer, before, question, (anchor, behind_control))
        ids += prompt_ids
        labels += [IGNORED] * len(prompt_ids)
        if answer is None:
            return ids, labels
        answer_ids = _answer_ids(template, tokenizer, answer)
        ids += answer_ids
        labels += answer_ids
        before, anchor = template.separator, behind_control
    separator_ids = _text_ids(tokenizer, template.separator, behind_control)
    return ids + separator_ids, labels + [IGNORED] * len(separator_ids)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def vicuna(system: str = VICUNA_SYSTEM) -> Template:
    """Vicuna v1, of LLaVA-1.5 and LLaVA-NeXT with Vicuna: `SYSTEM USER: question ASSISTANT: answer</s>USER: ...`."""
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
    """Mistral's instructions, of LLaVA-NeXT with Mistral: `[INST] question [/INST] answer </s>[INST] ...`.

    Source: repository haotian-liu/LLaVA, `llava/conversation.py` (`conv_mistral_instruct`, whose LLAMA_2 style writes a space
    on both sides of an answer) and `llava/train/train.py` (`preprocess_llama_2`).
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
    """ChatML, of Qwen2 and SmolLM2, with their system prompt.

    The ids are those of repository LLaVA-VL/LLaVA-NeXT, `llava/train/train.py` (`preprocess_qwen`). Its labels are not: it
    also puts loss on the assistant's header, the newline behind an answer, and each `<|im_start|>`, `<|im_end|>` and newline of
    a prompt. Here loss is on the answer and its `<|im_end|>`, as in the other templates. Where a question holds several
    images it leaves them in place; here they go to the front (`place_media`).
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
    """LLaVA's first stage: `<image>caption` and a newline, which is the only end that a caption has.

    Whatever else a question says is dropped; loss is on the caption and its newline. Several images of a question follow each
    other. LLaVA writes a BOS where the tokenizer does: set `adds_bos` to false for one that has none, as Qwen's.
    Source: repository haotian-liu/LLaVA, `llava/conversation.py` (`conv_llava_plain`) and `llava/train/train.py`
    (`preprocess_plain`).
    """
    return Template(
        name="plain", user="", assistant="", answer_suffix="\n", end="", adds_bos=adds_bos, captions=True
    )
