"""Pictures, token counts and turns in the form that Gradio's components take."""

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scripts.demo.sessions import PictureTokens, Turn
from vzip import UserError
from vzip.pictures import FORMATS, open_picture

MAX_PIXELS = 50_000_000
"""Most pixels of an uploaded picture: each takes 3 bytes while it is open."""
FIGURES_HEADER = [
    "| turn | first token | tokens/s | prompt run | cache |",
    "|--:|--:|--:|--:|--:|",
]


def open_upload(path: str) -> Image.Image:
    """Open an uploaded picture.

    Raises:
        UserError: the file is not a picture that can be read, or the picture has too many pixels.
    """
    limit = f"at most {MAX_PIXELS // 10**6} million pixels are accepted: make it smaller"
    try:
        # Opening reads only the size. A small file may hold a picture that fills the memory.
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UserError(f"This picture has {width:,} x {height:,} pixels; {limit}.")
        return open_picture(Path(path))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"This picture is too large; {limit}.") from error
    except (OSError, ValueError, MemoryError) as error:
        formats = ", ".join(FORMATS)
        raise UserError(
            f"This file is not a picture that can be read; choose another one ({formats})."
        ) from error


def describe_tokens(tokens: PictureTokens) -> str:
    """Say in numbers, as Markdown, what the drawings show."""
    # The first sentence is about the whole picture, the others mostly about the drawn tile.
    tile = tokens.tile
    share = f"{tokens.num_tokens / tokens.num_full_tokens:.0%}"
    sentences = [
        f"**{tokens.num_full_tokens:,} → {tokens.num_tokens:,} visual tokens** ({share}).",
    ]

    # CLS is a dominant token like the others, but no patch of the drawing shows it.
    num_patches = len(tile.dominant)
    cls = "CLS, which has no place in the picture, and " if tile.has_cls else ""
    attention_share = tile.saliency.flatten()[tile.dominant].sum() / tile.saliency.sum()
    sentences.append(
        f"{num_patches + tile.has_cls} dominant: {cls}{num_patches} patches, which hold "
        f"{attention_share:.0%} of the attention that all patches receive."
    )

    # A small budget may have no contextual tokens.
    if len(tile.contextual):
        num_merged = int((tile.members >= 0).sum())
        sentences.append(
            f"{len(tile.contextual)} contextual, made of the other {num_merged} patches.",
        )

    # Only one tile is drawn, so mention the others.
    if tokens.num_tiles > 1:
        sentences.append(
            f"The picture is cut into {tokens.num_tiles} tiles, and each is reduced by itself. "
            "The drawings show the first tile: the whole picture, made small."
        )

    return " ".join(sentences)


def _answer_text(turn: Turn) -> str:
    if turn.refusal:
        return turn.refusal
    if turn.answer is None:
        return "…"
    return turn.answer.text or "(an empty answer)"


def as_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return the turns of a setting as messages of a chatbot."""
    # The chatbot shows messages as HTML, so the text of visitor and model must be escaped.
    messages = []
    for turn in turns:
        for role, text in (("user", turn.question), ("assistant", _answer_text(turn))):
            messages.append({"role": role, "content": html.escape(text, quote=False)})

    return messages


def as_figures(turns: Sequence[Turn]) -> str:
    """Make a Markdown table of a setting's timings. Empty before the first answer."""
    lines = []
    for number, turn in enumerate(turns, start=1):
        answer = turn.answer
        if answer is None:
            continue

        # The rate counts the tokens behind the first one, so an answer of one token has none.
        rate = "–" if answer.tokens_per_second is None else f"{answer.tokens_per_second:.1f}"
        num_run = answer.num_prompt_tokens - answer.num_cached_tokens
        cells = [
            str(number),
            f"{answer.seconds_to_first_token:.2f} s",
            rate,
            f"{num_run:,} of {answer.num_prompt_tokens:,}",
            f"{answer.cache_bytes / 2**20:,.2f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")

    return "\n".join([*FIGURES_HEADER, *lines]) if lines else ""
