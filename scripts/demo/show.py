"""Pictures, token counts and turns in the form that Gradio's components take."""

import html
from collections.abc import Sequence

from scripts.demo.sessions import PictureTokens, Turn

FIGURES_HEADER = [
    "| turn | first token | tokens/s | prompt run | cache |",
    "|--:|--:|--:|--:|--:|",
]


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

        # A server does not tell how much it keeps.
        cache = f"{answer.cache_bytes / 2**20:,.2f} MiB" if answer.cache_bytes else "–"
        cells = [
            str(number),
            f"{answer.seconds_to_first_token:.2f} s",
            rate,
            f"{num_run:,} of {answer.num_prompt_tokens:,}",
            cache,
        ]
        lines.append(f"| {' | '.join(cells)} |")

    return "\n".join([*FIGURES_HEADER, *lines]) if lines else ""
