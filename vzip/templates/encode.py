"""Conversation templates: from turns of text to token ids and labels, built piece by piece.

Each piece is tokenized by itself, as the text that follows the piece before it. So the boundary
between a question and an answer is split as in the model's own training, and labels need no
counting of characters. Source of the Vicuna format: repository haotian-liu/LLaVA,
`llava/conversation.py` (`conv_vicuna_v1`) and `llava/train/train.py` (`preprocess_v1`).

A control token (`</s>`, `<|im_end|>`, ...) is set by its id, and only where the template writes it.
A question or an answer that spells one holds ordinary text, like `USER:` and `[INST]`: no example
can end its own turn or open another one. LLaVA's code takes such spellings for the tokens.

LLaVA's trainer finds the answers by counting tokens. Where that fails it prints "tokenization
mismatch" and puts no loss on the whole conversation. The same conversations have no loss here
(`_is_masked`). docs/fidelity.md lists what still differs.

`<image>` and `<video>` are placeholders, in questions and in answers. The reader of the data checks
that a conversation has as many of them as it has media.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vzip.errors import UserError
from vzip.templates.pieces import (
    IMAGE,
    VIDEO,
    anchor_after,
    control_token_id,
    ids_with_media,
    split_at,
)

__all__ = ["IMAGE", "VIDEO"]

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
    answer_mark: str = ""
    """Text that LLaVA's trainer looks for to find an answer; "" for a trainer that needs none."""
    image: tuple[str, ...] = (IMAGE,)
    """Tokens of an image. The one in the middle is repeated for each visual token."""
    video: tuple[str, ...] = (VIDEO,)
    """Tokens of a video, like those of an image."""
    image_text: str = ""
    """What a text says for an image, if the model's processor adds the other tokens of `image`."""
    media_end: str = "\n"
    """Text behind each image and video of a question."""

    @property
    def media(self) -> dict[str, tuple[str, ...]]:
        """The tokens that are written for `<image>` and `<video>`."""
        return {IMAGE: self.image, VIDEO: self.video}

    def placeholder(self, kind: str) -> str:
        """Return the token that is repeated for each visual token of an "image" or a "video"."""
        tokens = self.image if kind == "image" else self.video
        return tokens[len(tokens) // 2]


# Ids of questions and answers


def place_media(text: str, end: str = "\n") -> str:
    """Move the placeholders of a question or an answer to its front, each followed by `end`.

    Images come before videos. For one image this is LLaVA's preprocessing
    (`preprocess_multimodal`), which keeps only one of several. Video-LLaVA's moves nothing: its data
    starts with `<video>` and a newline already. Only its few examples with both kinds have the
    videos before the images.
    """
    front = (IMAGE + end) * text.count(IMAGE) + (VIDEO + end) * text.count(VIDEO)
    if not front:
        return text

    # White space is stripped as in LLaVA's code, also around a text that was in the right order.
    rest = text.replace(IMAGE, "").replace(VIDEO, "").strip()
    return (front + rest).strip()


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
        question = place_media(question, template.media_end)

    # Cut the template's own texts at its control tokens, then put the question between them.
    first, pairs_before = split_at(before + template.user, template.controls)
    text_after, pairs_after = split_at(template.assistant, template.controls)
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
    ids = ids_with_media(tokenizer, texts[0], anchor, template.media)
    for control, text in zip(controls, texts[1:], strict=True):
        ids.append(control_token_id(template.name, tokenizer, control))
        ids += ids_with_media(tokenizer, text, control_anchor, template.media)
    return ids


def _answer_ids(template: Template, tokenizer: Any, answer: str) -> list[int]:
    """Tokenize an answer with its prefix, its suffix and its end token."""
    # A prefix is a space, which follows the last word of the prompt. Any word can be the anchor.
    anchor = "a" if template.answer_prefix else ""
    text = template.answer_prefix + place_media(answer, template.media_end) + template.answer_suffix
    ids = ids_with_media(tokenizer, text, anchor, template.media)
    if template.end:
        ids.append(control_token_id(template.name, tokenizer, template.end))
    return ids


def _answer_labels(template: Template, tokenizer: Any, answer: str, ids: list[int]) -> list[int]:
    """Make the labels of an answer: its ids, without those of pictures and videos."""
    # The model never writes a picture. Most answers have none, so look at the text first.
    no_loss: set[int] = set()
    for placeholder, tokens in template.media.items():
        if placeholder in answer:
            no_loss |= set(tokenizer.convert_tokens_to_ids(list(tokens)))
    return [IGNORED if token in no_loss else token for token in ids]


# Conversations in which LLaVA's trainer finds no answers


def _is_masked(template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]) -> bool:
    """Whether LLaVA's trainer loses count of the tokens, and puts no loss on the conversation.

    It cuts the conversation at the end tokens, and expects one `answer_mark` in each part.
    """
    if not template.answer_mark:
        return False

    written = ""
    for question, answer in turns:
        # LLaVA's code writes no space behind an empty question, so the mark is incomplete.
        if question == "":
            return True

        # It cuts a text that spells the end token, and takes the unknown token for padding.
        text = question + (answer or "")
        if template.end in text or (tokenizer.unk_token or template.end) in text:
            return True

        written += template.user + place_media(question, template.media_end) + template.assistant
        if answer:
            written += template.answer_prefix + place_media(answer, template.media_end)
            written += template.answer_suffix + template.end

    # A text that spells the mark makes two of it. An empty last answer leaves a part without any.
    *parts, rest = written.split(template.end)
    return rest != "" or any(part.count(template.answer_mark) != 1 for part in parts)


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


def _join_turns(
    template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[int]]:
    """Make ids and labels of a conversation, with loss on all answers."""
    # Text after a control token may need another space than text at the start, so find out once.
    ids = [tokenizer.bos_token_id] if template.adds_bos else []
    labels = [IGNORED] * len(ids)
    control_anchor = anchor_after(tokenizer, template.end) if template.end else ""

    # The system prompt comes before the first question, the separator before every other one.
    before = template.system
    anchor = ""
    last = len(turns) - 1
    for number, (question, answer) in enumerate(turns):
        # For an empty answer LLaVA's code writes nothing, not even its end: the next question follows.
        is_unanswered = answer == "" and template.answer_mark != ""
        if is_unanswered and number < last:
            before += template.user + place_media(question, template.media_end) + template.assistant
            continue

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
        if answer is None or is_unanswered:
            return ids, labels

        # The end token has loss too: the model has to learn where its answer ends.
        answer_ids = _answer_ids(template, tokenizer, answer)
        ids += answer_ids
        labels += _answer_labels(template, tokenizer, answer, answer_ids)

        # From now on a question follows the end token of an answer.
        before = template.separator
        anchor = control_anchor

    # A separator also follows the last answer, as in the training of these models.
    separator_ids = ids_with_media(tokenizer, template.separator, control_anchor)
    return ids + separator_ids, labels + [IGNORED] * len(separator_ids)


def encode(
    template: Template, tokenizer: Any, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[int]]:
    """Make token ids and labels of a conversation.

    Each `<image>` and `<video>` is one id; nothing is expanded yet.

    Args:
        template: the model's training format.
        tokenizer: the model's tokenizer. It must know the template's tokens, and the placeholders
            of the conversation.
        turns: (question, answer) pairs. None as the last answer ends the ids where generation
            starts.

    Returns:
        ids and labels of equal length. Labels are `IGNORED` except on answers, with their prefix
        and suffix, and on their end tokens. All labels are `IGNORED` if LLaVA's trainer puts no
        loss on the conversation.

    Raises:
        UserError: the template does not fit the tokenizer, the tokenizer does not know a token, or
            the template takes captions and the conversation is not one.
    """
    _check_turns(template, tokenizer, turns)
    ids, labels = _join_turns(template, tokenizer, turns)

    # A prompt, whose last answer is still to come, is not for training.
    is_prompt = bool(turns) and turns[-1][1] is None
    if not is_prompt and _is_masked(template, tokenizer, turns):
        labels = [IGNORED] * len(ids)
    return ids, labels


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
        answer_mark=" ASSISTANT: ",
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
        answer_mark="[/INST] ",
    )


def chatml(system: str) -> Template:
    """ChatML with the system prompt `system`, which Qwen2 and SmolLM2 use.

    The format is that of repository LLaVA-VL/LLaVA-NeXT, `llava/train/train.py` (`preprocess_qwen`).
    That function also puts loss on the assistant's header, on the newline after an answer, and on
    each `<|im_start|>`, `<|im_end|>` and newline of a prompt. Here the loss is on the answer and its
    `<|im_end|>`, as in the other templates. White space at the edges of questions and answers, and
    several images in one question, get other ids: docs/fidelity.md says which.
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
    images of a question follow each other, where LLaVA keeps one. LLaVA writes a BOS token if the
    tokenizer has one: set `adds_bos` to false for a tokenizer without it, such as Qwen's. Source:
    repository haotian-liu/LLaVA, `llava/conversation.py` (`conv_llava_plain`) and
    `llava/train/train.py` (`preprocess_plain`).
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
