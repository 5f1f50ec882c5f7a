"""Conversation templates: from turns of text to token ids and labels, built piece by piece.

Each piece is tokenized where it stands, so that no boundary between question and answer can be split differently than in
the model's own training, and labels need no counting of characters. Source of the Vicuna format: repository
haotian-liu/LLaVA, `llava/conversation.py` (`conv_vicuna_v1`) and `llava/train/train.py` (`preprocess_v1`).
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
    separator: str = ""
    adds_bos: bool = False


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _ids_after(tokenizer: Any, anchor: str, text: str) -> list[int]:
    """Ids of `text` as it stands after `anchor`: a SentencePiece tokenizer puts no space before it there."""
    head, whole = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
    if whole[: len(head)] != head:
        raise UserError(f"the tokenizer joins {anchor!r} and {text[:40]!r}; this template does not fit the tokenizer")
    return whole[len(head) :]


def place_media(question: str) -> str:
    """The question with its placeholders at the front, each followed by a newline: first the images, then the videos.

    For images this is LLaVA's preprocessing (`preprocess_multimodal`). Video-LLaVA's moves nothing: its data starts with
    `<video>` and a newline already, and the few rows with both have the videos before the images.
    """
    front = (IMAGE + "\n") * question.count(IMAGE) + (VIDEO + "\n") * question.count(VIDEO)
    return (front + question.replace(IMAGE, "").replace(VIDEO, "").strip()).strip() if front else question


def _placeholder_id(tokenizer: Any, placeholder: str) -> int:
    token_id: int | None = tokenizer.convert_tokens_to_ids(placeholder)
    if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
        raise UserError(f"a question has {placeholder}, which this model's tokenizer does not know; take such rows out")
    return token_id


def _prompt_ids(tokenizer: Any, text: str, anchor: str) -> list[int]:
    """Ids of a prompt that stands after `anchor` ("" at the start), one id for each `<image>` and `<video>`, in order.

    Around a placeholder every chunk of text is tokenized by itself, as in LLaVA (`tokenizer_image_token`).
    """
    first, *others = re.split(f"({IMAGE}|{VIDEO})", text)
    ids = _ids_after(tokenizer, anchor, first) if anchor and first else _ids(tokenizer, first)
    for placeholder, chunk in zip(others[::2], others[1::2], strict=True):
        ids += [_placeholder_id(tokenizer, placeholder), *_ids(tokenizer, chunk)]
    return ids


def _answer_ids(tokenizer: Any, prefix: str, answer: str) -> list[int]:
    """Ids of an answer: after a prompt's last word where a space leads it, else by itself."""
    return _ids_after(tokenizer, "a", prefix + answer) if prefix else _ids(tokenizer, answer)


def encode(template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, one id for each `<image>` and `<video>`, not yet expanded.

    Args:
        template: the model's training format.
        tokenizer: the model's tokenizer; it must know the placeholders that the questions have.
        turns: (question, answer) pairs; None as the last answer ends the row where generation starts.

    Returns:
        ids and labels of equal length; labels are `IGNORED` but on answers, with their prefix and suffix, and their end tokens.

    Raises:
        UserError: a tokenizer that the template does not fit, or that does not know a placeholder.
    """
    ids = [tokenizer.bos_token_id] if template.adds_bos else []
    labels = [IGNORED] * len(ids)
    before, anchor = template.system, ""
    for question, answer in turns:
        prompt = before + template.user + place_media(question) + template.assistant
        prompt_ids = _prompt_ids(tokenizer, prompt, anchor)
        ids += prompt_ids
        labels += [IGNORED] * len(prompt_ids)
        if answer is None:
            break
        answer_ids = _answer_ids(tokenizer, template.answer_prefix, answer + template.answer_suffix)
        answer_ids += _ids(tokenizer, template.end)
        separator_ids = _ids_after(tokenizer, template.end, template.separator) if template.separator else []
        ids += answer_ids + separator_ids
        labels += answer_ids + [IGNORED] * len(separator_ids)
        before, anchor = "", template.end + template.separator
    return ids, labels


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
    """ChatML, of Qwen2 and SmolLM2, with their system prompt."""
    return Template(
        name="chatml",
        system=f"<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        separator="\n",
    )
