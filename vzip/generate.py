"""Generate the answers to a batch of prompts.

Training's evaluation, evaluation harnesses and `scripts/efficiency` all generate here.
`vzip.chat` does not: it streams tokens, and keeps the KV cache from question to question.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer."""

    text: str
    token_ids: list[int]
    """The answer's tokens, up to and with the first end token."""


def padding_id(tokenizer: Any) -> int:
    """Return the id that pads a batch: the tokenizer's own, or that of its end token."""
    token_id: int = tokenizer.pad_token_id
    if token_id is None:
        token_id = tokenizer.eos_token_id
    return token_id


def end_ids(model: Any, processor: Any) -> set[int]:
    """Collect the ids that end an answer: the model's own, and what its chat template writes there.

    Args:
        model: any model that generates.
        processor: its processor, with a chat template.
    """
    # A config may have one id, several, or None.
    tokenizer = processor.tokenizer
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id}
    ends |= set(configured) if isinstance(configured, list) else {configured}

    # A model answers as it was trained, and its config may name another end token than the template
    # (ChatML). So render one turn, and look at the first token behind the answer.
    turns = []
    for role, text in (("user", "question"), ("assistant", "answer")):
        turns.append({"role": role, "content": [{"type": "text", "text": text}]})
    rendered = processor.apply_chat_template(turns, tokenize=False)
    behind = tokenizer(rendered.rpartition("answer")[2], add_special_tokens=False)["input_ids"]

    # Ordinary text behind an answer, such as a newline, may also stand inside one.
    ends |= set(behind[:1]) & set(tokenizer.all_special_ids)

    return ends - {None}


def generate_answers(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    ends: Collection[int],
    **settings: Any,
) -> list[GeneratedAnswer]:
    """Generate one answer to each prompt of a batch.

    Args:
        model: any model that generates.
        tokenizer: its tokenizer.
        inputs: the model's arguments: `input_ids` and `attention_mask` int64[B, T], padded on the
            left, and those of the media.
        ends: tokens that end an answer.
        settings: further arguments of the model's `generate`, e.g. `max_new_tokens`.
    """
    # `generate` returns the prompts with the answers behind them. It needs the tokenizer only for
    # `stop_strings`.
    output = model.generate(
        **inputs,
        **settings,
        eos_token_id=sorted(ends),
        pad_token_id=padding_id(tokenizer),
        tokenizer=tokenizer,
    )
    new_ids = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)

    answers = []
    for text, ids in zip(texts, new_ids.tolist(), strict=True):
        # Padding follows the end of an answer that is shorter than the longest of the batch.
        is_end = [token in ends for token in ids]
        length = is_end.index(True) + 1 if True in is_end else len(ids)
        answers.append(GeneratedAnswer(text, ids[:length]))
    return answers
