"""The report of a preflight, which `check.json` holds, and the error that sums up its faults."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.conversations import BadExample
from data.preflight.lengths import MEASURES, ExampleLengths
from vzip import UserError

NUM_SHOWN = 5
"""Number of faults that the error message names."""


def preflight_report(
    lengths: ExampleLengths,
    broken_files: Sequence[BadExample],
    left_out: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    max_positions: int,
) -> dict[str, Any]:
    """Describe all examples, the examples of each source, and the faults.

    The largest source comes first.

    Args:
        lengths: what `measure_lengths` returned.
        broken_files: what `check_files` returned.
        left_out: "bad_rows" of the subset's manifest.
        max_tokens: text tokens at which conversations were cut.
        max_positions: tokens that the language model takes.
    """
    num_left_out = Counter(bad["source"] for bad in left_out)
    num_broken = Counter(bad.source for bad in broken_files)

    # The largest source comes first. A source that has lost all its examples comes last.
    sources = [source for source, _ in Counter(lengths.sources.tolist()).most_common()]
    sources += sorted({*num_left_out, *num_broken} - {*sources})

    by_source = {}
    for source in sources:
        group = _describe(lengths, lengths.sources == source, max_positions)
        group["left_out"] = num_left_out[source]
        group["broken_files"] = num_broken[source]
        by_source[source] = group

    # The same figures of all sources together.
    everything = _describe(lengths, np.ones(len(lengths.ids), dtype=bool), max_positions)
    everything["left_out"] = num_left_out.total()
    everything["broken_files"] = num_broken.total()

    # The run leaves these out without an error, so they are listed apart from the faults.
    all_left_out = []
    for bad in left_out:
        all_left_out.append({"id": bad["id"], "source": bad["source"], "reason": bad["reason"]})
    all_left_out += _without_labels(lengths, max_tokens)

    faults = [*broken_files, *_too_long_faults(lengths, max_positions)]
    return {
        "max_tokens": max_tokens,
        "max_positions": max_positions,
        "fitting_max_tokens": _fitting_max_tokens(lengths, max_positions),
        "all": everything,
        "sources": by_source,
        "left_out": all_left_out,
        "faults": [asdict(fault) for fault in faults],
    }


def check_faults(report: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if a report has faults.

    The message counts them by source, names the first ones, and says what to do.

    Args:
        report: what `preflight_report` returned.
        folder: the folder of `check.json`, which the message points to.
    """
    faults = report["faults"]
    if not faults:
        return

    by_source = Counter(fault["source"] for fault in faults)
    counts = ", ".join(f"{source}: {count}" for source, count in sorted(by_source.items()))
    num_broken = report["all"]["broken_files"]
    num_too_long = report["all"]["too_long"]

    lines = [
        f"{num_broken} files of the subset can't be read or have changed, and {num_too_long} "
        f"examples are too long ({counts}). The first ones:"
    ]
    for fault in faults[:NUM_SHOWN]:
        lines.append(f"  {fault['id']}: {fault['reason']}")

    # Each kind of fault has its own remedy.
    if num_broken:
        lines.append("Put the files back, or remove them and run `make data` again, which fetches them anew.")

    if num_too_long:
        # Images alone may be too long. Then no shorter text helps.
        fitting = report["fitting_max_tokens"]
        shorter_text = f"data.max_tokens={fitting} or " if fitting > 0 else ""
        lines.append(f"For the examples that are too long, set {shorter_text}a smaller reducer.budget.")

    lines.append(f"{folder / 'check.json'} lists all of them.")
    raise UserError("\n".join(lines))


def _without_labels(lengths: ExampleLengths, max_tokens: int) -> list[dict[str, str]]:
    """List the examples without a label, with the reason."""
    listed = []
    for row in np.flatnonzero(~lengths.trained).tolist():
        # Without a label before the cut, its template gave it none (docs/fidelity.md).
        reason = f"the cut at data.max_tokens={max_tokens} leaves no answer"
        if not lengths.whole_labels[row]:
            reason = "LLaVA's trainer masks it: a text is empty, or spells a token or name of the template"
        listed.append({"id": str(lengths.ids[row]), "source": str(lengths.sources[row]), "reason": reason})
    return listed


def _too_long(lengths: ExampleLengths, max_positions: int) -> np.ndarray:
    """bool[conversations]: whether an example has more tokens than the language model takes."""
    too_long: np.ndarray = lengths.trained & (lengths.expanded > max_positions)
    return too_long


def _too_long_faults(lengths: ExampleLengths, max_positions: int) -> list[BadExample]:
    """List the examples that are too long for the language model."""
    faults = []
    for row in np.flatnonzero(_too_long(lengths, max_positions)).tolist():
        reason = f"{lengths.expanded[row]} tokens, more than {max_positions}"
        faults.append(BadExample(str(lengths.ids[row]), str(lengths.sources[row]), reason))
    return faults


def _fitting_max_tokens(lengths: ExampleLengths, max_positions: int) -> int | None:
    """Find the largest `data.max_tokens` with which all examples fit. None if they fit already."""
    too_long = _too_long(lengths, max_positions)
    if not too_long.any():
        return None

    # The cut counts an image as one placeholder, so it must leave room for the other tokens.
    added_by_media = (lengths.visual - lengths.media)[too_long]
    return max_positions - int(added_by_media.max())


def _describe(lengths: ExampleLengths, chosen: np.ndarray, max_positions: int) -> dict[str, Any]:
    """Count and measure the conversations that are True in `chosen`, bool[conversations]."""
    # Conversations without a label are not trained on, so they are counted apart.
    trained = chosen & lengths.trained
    cut = chosen & (lengths.cut_turns > 0)
    num_by_turn = Counter(lengths.cut_turns[cut].tolist())

    # The cut removes labels even from conversations that keep none, so count all of them.
    num_whole_labels = int(lengths.whole_labels[chosen].sum())
    num_lost_labels = num_whole_labels - int(lengths.labels[chosen].sum())

    return {
        "rows": int(trained.sum()),
        "media": int(lengths.media[trained].sum()),
        "without_labels": int((chosen & ~lengths.trained).sum()),
        "too_long": int((chosen & _too_long(lengths, max_positions)).sum()),
        "cut": {
            "rows": int(cut.sum()),
            "lost_labels": num_lost_labels,
            "lost_share": num_lost_labels / max(1, num_whole_labels),
            "rows_by_turn": {str(turn): count for turn, count in sorted(num_by_turn.items())},
        },
        "tokens": {name: _spread(getattr(lengths, name)[trained]) for name in MEASURES},
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    """Return mean, percentiles and maximum. Zeros if there are no values."""
    # A source may have lost all its examples, and numpy has no percentiles of nothing.
    if not len(values):
        return {"mean": 0, "p10": 0, "p50": 0, "p90": 0, "max": 0}

    p10, p50, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return {
        "mean": round(float(values.mean()), 1),
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "max": int(values.max()),
    }
