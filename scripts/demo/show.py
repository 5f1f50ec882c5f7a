"""What the demo's page shows of pictures and turns, as Gradio's parts take it."""

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scripts.demo.sessions import Seen, Turn
from vzip import UserError
from vzip.pictures import FORMATS, open_picture

MAX_PIXELS = 50_000_000


def open_upload(path: str) -> Image.Image:
    """The picture in an uploaded file. Raises UserError for a file that is none, or a picture of too many pixels."""
    large = f"at most {MAX_PIXELS // 10**6} million pixels are taken: make it smaller"
    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UserError(f"This picture has {width:,} x {height:,} pixels; {large}.")
        return open_picture(Path(path))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"This picture is too large; {large}.") from error
    except (OSError, ValueError, MemoryError) as error:
        kinds = ", ".join(FORMATS)
        raise UserError(f"This file is no picture that can be read; choose another one ({kinds}).") from error


def describe_tokens(seen: Seen) -> str:
    """What the drawings show, in numbers, as Markdown."""
    tile = seen.tile
    share = tile.saliency.flatten()[tile.dominant].sum() / tile.saliency.sum()
    cls = "CLS, which has no place in the picture, and " if tile.has_cls else ""
    parts = [
        f"**{seen.num_full_tokens:,} → {seen.num_tokens:,} visual tokens** ({seen.num_tokens / seen.num_full_tokens:.0%}).",
        f"{len(tile.dominant) + tile.has_cls} dominant: {cls}{len(tile.dominant)} patches, which hold {share:.0%} of the "
        f"attention that all patches receive.",
    ]
    if len(tile.contextual):
        num_members = int((tile.members >= 0).sum())
        parts.append(f"{len(tile.contextual)} contextual, made of the other {num_members} patches.")
    if seen.num_tiles > 1:
        parts.append(
            f"The picture is cut into {seen.num_tiles} tiles, each reduced by itself; drawn is the first: the whole picture, "
            "made small."
        )
    return " ".join(parts)


def as_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """A row's turns as a chatbot's messages, which are HTML."""
    shown = []
    for turn in turns:
        text = turn.refusal or (turn.answer.text or "(an empty answer)" if turn.answer else "…")
        for role, content in (("user", turn.question), ("assistant", text)):
            shown.append({"role": role, "content": html.escape(content, quote=False)})
    return shown


def as_figures(turns: Sequence[Turn]) -> str:
    """A row's turns in numbers, as a Markdown table with a line for each; "" where there are none."""
    lines = []
    for number, answer in enumerate((turn.answer for turn in turns), start=1):
        if answer is not None:
            rate = "–" if answer.tokens_per_second is None else f"{answer.tokens_per_second:.1f}"
            run = f"{answer.num_prompt_tokens - answer.num_cached_tokens:,} of {answer.num_prompt_tokens:,}"
            mebibytes = f"{answer.cache_bytes / 2**20:,.2f} MiB"
            lines.append(
                f"| {number} | {answer.seconds_to_first_token:.2f} s | {rate} | {run} | {mebibytes} |"
            )
    header = ["| turn | first token | tokens/s | prompt run | cache |", "|--:|--:|--:|--:|--:|"]
    return "\n".join(header + lines) if lines else ""
