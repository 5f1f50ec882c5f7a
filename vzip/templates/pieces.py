"""Token ids of one piece of text, as it stands behind other text or behind a token."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vzip.errors import UserError

IMAGE = "<image>"
VIDEO = "<video>"

MEDIA = {IMAGE: (IMAGE,), VIDEO: (VIDEO,)}
"""The tokens that most models have for an image and a video."""


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize `text`. Control tokens that it spells are text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def ids_alone(tokenizer: Any, text: str) -> list[int]:
    """Tokenize `text` as the start of a text.

    SentencePiece puts a space before every text. The tokenizers of transformers 5 leave it out if
    the text starts with one, so it is added here.
    """
    # A tokenizer that leaves it out gives a word and the word behind a space the same ids. It takes
    # SentencePiece's sign for a space as one, too.
    if text.startswith((" ", "▁")) and _ids(tokenizer, "a") == _ids(tokenizer, " a"):
        text = " " + text
    return _ids(tokenizer, text)


def ids_after(tokenizer: Any, anchor: str, text: str) -> list[int]:
    """Tokenize `text` as it stands after the text `anchor`; an empty anchor is the start of a text.

    A SentencePiece tokenizer puts a space before a text, but not in the middle of one.
    """
    if not anchor:
        return ids_alone(tokenizer, text)

    # Tokenize both together, and take away the anchor's own ids. This works only if no token spans
    # the boundary.
    anchor_ids = _ids(tokenizer, anchor)
    ids = _ids(tokenizer, anchor + text)
    if ids[: len(anchor_ids)] != anchor_ids:
        raise UserError(
            f"the tokenizer joins {anchor!r} and {text[:40]!r}; this template does not fit the tokenizer"
        )
    return ids[len(anchor_ids) :]


def anchor_after(tokenizer: Any, control: str) -> str:
    """Find the anchor with which `ids_after` tokenizes text as it stands after a control token.

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


def control_token_id(template: str, tokenizer: Any, control: str) -> int:
    """Look up a token that a template writes. Raises UserError if the tokenizer lacks it."""
    error = (
        f"the {template!r} template writes {control}, which this model's tokenizer does not "
        "know; choose the model.template that the model was trained with"
    )
    return _token_id(tokenizer, control, error)


def split_at(text: str, tokens: Sequence[str]) -> tuple[str, Iterator[tuple[str, str]]]:
    """Cut `text` at the tokens that it spells. Returns the text before, and (token, text) pairs."""
    if not tokens:
        return text, iter(())

    # re.split keeps what a group matches: text, token, text, token, ..., text.
    pattern = "|".join(re.escape(token) for token in tokens)
    first, *rest = re.split(f"({pattern})", text)
    return first, zip(rest[::2], rest[1::2], strict=True)


def ids_with_media(
    tokenizer: Any, text: str, anchor: str, media: Mapping[str, Sequence[str]] = MEDIA
) -> list[int]:
    """Tokenize text that stands after `anchor`, with ids for each `<image>` and `<video>`.

    The text on both sides of a placeholder is tokenized by itself, as in LLaVA
    (`tokenizer_image_token`).

    Args:
        tokenizer: the model's tokenizer.
        text: the text.
        anchor: see `ids_after`.
        media: the tokens that are written for `<image>` and `<video>`.

    Raises:
        UserError: the tokenizer does not know a token of a placeholder.
    """
    first, rest = split_at(text, (IMAGE, VIDEO))
    ids = ids_after(tokenizer, anchor, first)
    for placeholder, chunk in rest:
        for token in media[placeholder]:
            error = f"an example has {token}, which this model's tokenizer does not know; remove such ones"
            ids.append(_token_id(tokenizer, token, error))
        ids += ids_alone(tokenizer, chunk)
    return ids
