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
    """The token that pads a batch: the tokenizer's own, or its end token if it has none."""
    token_id: int = tokenizer.pad_token_id
    if token_id is None:
        token_id = tokenizer.eos_token_id
    return token_id


def end_ids(model: Any, processor: Any) -> set[int]:
    """The tokens that end an answer: the model's own, and what the chat template writes after one.

    Args:
        model: any model that generates.
        processor: its processor, with a chat template.
    """
    tokenizer = processor.tokenizer
    configured = model.generation_config.eos_token_id
    # A config may have one id, several, or None.
    ends = {tokenizer.eos_token_id}
    ends |= set(configured) if isinstance(configured, list) else {configured}

    # Render one turn, and look at the first token behind the answer.
    turns = []
    for role, text in (("user", "question"), ("assistant", "answer")):
        turns.append({"role": role, "content": [{"type": "text", "text": text}]})
    rendered = processor.apply_chat_template(turns, tokenize=False)
    behind = tokenizer(rendered.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
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
    # `generate` returns the prompts with the answers behind them. It needs the tokenizer for
    # `stop_strings` alone.
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
