"""Turn what the servers did into figures, and these into a table of RESULTS.md."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from scripts.serve.load import LoadResult

ORDER = ("full", "reduced", "reduced", "full")
"""Turns of the settings. A machine that slows down slows both of them."""

FIGURES = {
    "requests_a_second": ("requests a second", 2, False),
    "first_token_ms": ("time to first token, ms", 0, True),
    "token_ms": ("time a token after it, ms", 1, True),
    "peak_blocks": ("peak KV cache, blocks", 0, True),
}
"""Title, decimals, and whether less is better, by the name of the figure."""


def _figures(turns: Sequence[LoadResult]) -> dict[str, float]:
    """Compute the figures of one setting under one load, over all of its turns."""
    answers = [answer for turn in turns for answer in turn.answers]
    return {
        "requests_a_second": len(answers) / sum(turn.seconds for turn in turns),
        "first_token_ms": 1000 * median(answer.first_token_s for answer in answers),
        "token_ms": 1000 * median(answer.token_s for answer in answers),
        "peak_blocks": max(turn.cache.used for turn in turns),
        "blocks": turns[0].cache.blocks,
        "tokens_a_block": turns[0].cache.tokens_a_block,
        "prompt_tokens": mean(answer.prompt_tokens for answer in answers),
        "num_requests": len(answers),
    }


def ratio(name: str, full: float, reduced: float) -> float | None:
    """Return how many times better the reduced model is; None if it has no figure."""
    better, worse = (full, reduced) if FIGURES[name][2] else (reduced, full)
    return better / worse if worse else None


def summarize(results: Mapping[int, Mapping[str, Sequence[LoadResult]]]) -> list[dict[str, Any]]:
    """Compute the figures of all loads, and how many times better the reduced model is."""
    rows = []
    for concurrency, of_settings in results.items():
        row: dict[str, Any] = {"concurrency": concurrency}
        for setting, turns in of_settings.items():
            row[setting] = _figures(turns)
        row["ratio"] = {name: ratio(name, row["full"][name], row["reduced"][name]) for name in FIGURES}
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the figures as a table, with a line on the tokens in front of it."""
    first = rows[0]
    counts = [f"{first[setting]['prompt_tokens']:.0f} ({setting})" for setting in ("full", "reduced")]
    caches = []
    for setting in ("full", "reduced"):
        figures = first[setting]
        caches.append(f"{figures['blocks']:.0f} blocks of {figures['tokens_a_block']:.0f} ({setting})")

    lines = [
        f"Tokens of a prompt: {', '.join(counts)}. KV cache: {', '.join(caches)}.",
        "",
        "| at a time | | full | reduced | times better |",
        "|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        for name, (title, digits, _) in FIGURES.items():
            values = [f"{row[setting][name]:,.{digits}f}" for setting in ("full", "reduced")]
            times = row["ratio"][name]
            shown = "" if times is None else f"{times:.2f}"
            lines.append(f"| {row['concurrency']} | {title} | {' | '.join(values)} | {shown} |")
    return "\n".join(lines)
