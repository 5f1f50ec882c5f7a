"""The preflight: what a run would meet in its subset, before a GPU is taken.

Lengths come from the tokenized rows and the recorded sizes of their images, so that no picture need be processed to count
its tokens; files are opened by their header, and a sample is decoded.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data.conversations import BadExample
from data.progress import progress
from vzip import UserError
from vzip.families import Family
from vzip.pictures import FORMATS, open_picture
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED
from vzip.videos import check_video

NUM_DECODED = 1000
"""Pictures and videos of the sample that is decoded."""
NUM_EXAMPLES = 5
"""Faults that a message names."""
MEASURES = {
    "text": "text tokens",
    "visual": "visual tokens",
    "expanded": "tokens in the language model",
    "labels": "label tokens",
}
"""Columns of `ExampleLengths` that are described, and what they are."""


@dataclass(frozen=True)
class ExampleLengths:
    """The subset's rows as columns, also those of which the cut leaves no label. int64[rows] where nothing else is said."""

    ids: np.ndarray
    """str[rows]."""
    sources: np.ndarray
    """str[rows]."""
    media: np.ndarray
    """Images and videos."""
    text: np.ndarray
    """Tokens of the cut row that are no placeholders."""
    visual: np.ndarray
    """Tokens that the placeholders become."""
    labels: np.ndarray
    whole_labels: np.ndarray
    """Label tokens before the cut."""
    cut_turns: np.ndarray
    """The turn, from 1, in whose question or answer the row was cut; 0 where it was not."""

    @property
    def expanded(self) -> np.ndarray:
        """Tokens that the language model gets."""
        tokens: np.ndarray = self.text + self.visual
        return tokens

    @property
    def trained(self) -> np.ndarray:
        """bool[rows]: whether a row has a label; others are no examples."""
        has_labels: np.ndarray = self.labels > 0
        return has_labels


def _visual_tokens(table: pa.Table, family: Family, reducer: Reducer, num_frames: int) -> np.ndarray:
    """int64[rows]: placeholders of each row's images and videos."""

    @cache  # many rows have pictures of the same sizes
    def count(sides: tuple[int, ...]) -> int:
        return family.num_example_tokens(reducer, list(zip(sides[::2], sides[1::2], strict=True)))

    num_videos = table["num_videos"].to_numpy()
    visual = np.array([count(tuple(sides)) for sides in table["sizes"].to_pylist()], dtype=np.int64)
    return visual + num_videos * family.num_video_tokens(reducer, num_frames) if num_videos.any() else visual


def _cut_turn(labels: np.ndarray) -> int:
    """The turn in which int32[tokens] of a cut row end: the last answer that has begun, or the question behind it."""
    carries_loss = labels != IGNORED
    num_begun = np.count_nonzero(np.diff(carries_loss, prepend=False) & carries_loss)
    return int(num_begun + (not carries_loss[-1]))


def measure_lengths(
    table: pa.Table, family: Family, reducer: Reducer, *, num_frames: int = 1
) -> ExampleLengths:
    """The lengths of tokenized rows.

    Args:
        table: as `data.examples.tokens.SCHEMA` has it.
        family: of the model, which may be without weights.
        reducer: by which visual tokens are counted.
        num_frames: of a video.

    Raises:
        UserError: a budget that does not fit, or videos for a model that takes none.
    """
    num_tokens, media = (
        table["num_tokens"].to_numpy(),
        table["num_images"].to_numpy() + table["num_videos"].to_numpy(),
    )
    cut_turns = np.zeros(len(table), dtype=np.int64)
    for row in np.flatnonzero(table["num_whole_tokens"].to_numpy() > num_tokens).tolist():
        cut_turns[row] = _cut_turn(table["labels"][row].values.to_numpy())
    return ExampleLengths(
        ids=table["id"].to_numpy(),
        sources=table["source"].to_numpy(),
        media=media,
        text=num_tokens - media,
        visual=_visual_tokens(table, family, reducer, num_frames),
        labels=table["num_labels"].to_numpy(),
        whole_labels=table["num_whole_labels"].to_numpy(),
        cut_turns=cut_turns,
    )


def _look(kind: str, path: Path, size: tuple[int, int] | None, *, decode: bool) -> None:
    """Raises OSError or ValueError for an image or video that can't be read, or is not of the recorded (height, width)."""
    if not path.stat().st_size:
        raise ValueError("an empty file")
    if kind == "video":
        if decode:
            check_video(path)
        return
    try:
        with Image.open(path, formats=FORMATS) as picture:
            found = picture.size
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    if size is not None and sorted(found) != sorted(size):  # a header's sides may lie on their side
        raise ValueError(f"{found[0]} x {found[1]} px, but {size[1]} x {size[0]} when the subset was made")
    if decode:
        open_picture(path)


def check_files(
    table: pa.Table, folder: Path, *, seed: int = 0, num_decoded: int = NUM_DECODED
) -> list[BadExample]:
    """What is wrong with the rows' files, each with the first row that has it: every one by its header, in threads.

    Args:
        table: as `data.examples.tokens.SCHEMA` has it.
        folder: of the images and videos.
        seed: of the sample.
        num_decoded: files of the sample that is decoded, videos as far as `check_video` does.

    Raises:
        UserError: videos in the sample, but no PyAV to read them.
    """
    media: dict[tuple[str, str], tuple[str, str, tuple[int, int] | None]] = {}
    for row in table.select(["id", "source", "images", "videos", "sizes"]).to_pylist():
        sizes = list(zip(row["sizes"][::2], row["sizes"][1::2], strict=True))
        for path, size in zip(row["images"], sizes, strict=True):
            media.setdefault(("image", path), (row["id"], row["source"], size))
        for path in row["videos"]:
            media.setdefault(("video", path), (row["id"], row["source"], None))
    sample = set(random.Random(seed).sample(sorted(media), min(num_decoded, len(media))))

    def fault(entry: tuple[str, str]) -> BadExample | None:
        (kind, path), (row_id, source, size) = entry, media[entry]
        try:
            _look(kind, folder / path, size, decode=entry in sample)
        except UserError:  # it is a ValueError, but of the installation and not of this row
            raise
        except FileNotFoundError:
            return BadExample(row_id, source, f"{path}: missing")
        except (OSError, ValueError) as error:
            return BadExample(row_id, source, f"{path}: {error}")
        return None

    with ThreadPoolExecutor() as pool:
        found = list(progress(pool.map(fault, media), total=len(media), title="check files", unit="file"))
    return [bad for bad in found if bad is not None]


def _spread(values: np.ndarray) -> dict[str, float]:
    p10, p50, p90 = np.percentile(values, [10, 50, 90]).tolist() if len(values) else (0, 0, 0)
    mean, most = (float(values.mean()), int(values.max())) if len(values) else (0, 0)
    return {"mean": round(mean, 1), "p10": p10, "p50": p50, "p90": p90, "max": most}


def _summary(lengths: ExampleLengths, rows: np.ndarray, max_positions: int) -> dict[str, Any]:
    """Of bool[rows]."""
    trained, cut = rows & lengths.trained, rows & (lengths.cut_turns > 0)
    lost = int((lengths.whole_labels - lengths.labels)[rows].sum())
    turns = Counter(lengths.cut_turns[cut].tolist())
    return {
        "rows": int(trained.sum()),
        "media": int(lengths.media[trained].sum()),
        "without_labels": int((rows & ~lengths.trained).sum()),
        "too_long": int((trained & (lengths.expanded > max_positions)).sum()),
        "cut": {
            "rows": int(cut.sum()),
            "lost_labels": lost,
            "lost_share": lost / max(1, int(lengths.whole_labels[rows].sum())),
            "rows_by_turn": {str(turn): count for turn, count in sorted(turns.items())},
        },
        "tokens": {name: _spread(getattr(lengths, name)[trained]) for name in MEASURES},
    }


def report(
    lengths: ExampleLengths,
    files: Sequence[BadExample],
    left_out: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    max_positions: int,
) -> dict[str, Any]:
    """What was found, as check.json has it: of all rows, by source (the largest first), and the faults.

    Args:
        lengths: of the rows.
        files: what `check_files` returned.
        left_out: the manifest's "bad_rows".
        max_tokens: text tokens at which rows were cut.
        max_positions: tokens that the language model takes.
    """
    refused, broken = (
        Counter(sources) for sources in ([row["source"] for row in left_out], [bad.source for bad in files])
    )
    counts = Counter(lengths.sources.tolist())
    sources = [source for source, _ in counts.most_common()] + sorted({*refused, *broken} - {*counts})
    more = {source: {"left_out": refused[source], "broken_files": broken[source]} for source in sources}
    too_long = np.flatnonzero(lengths.trained & (lengths.expanded > max_positions)).tolist()
    faults = list(files) + [
        BadExample(
            str(lengths.ids[row]),
            str(lengths.sources[row]),
            f"{lengths.expanded[row]} tokens, more than {max_positions}",
        )
        for row in too_long
    ]
    room = max_positions - int((lengths.visual - lengths.media)[too_long].max(initial=0))
    everything = _summary(lengths, np.ones(len(lengths.ids), dtype=bool), max_positions)
    return {
        "max_tokens": max_tokens,
        "max_positions": max_positions,
        "fitting_max_tokens": room if too_long else None,
        "all": everything | {"left_out": refused.total(), "broken_files": broken.total()},
        "sources": {s: _summary(lengths, lengths.sources == s, max_positions) | more[s] for s in sources},
        "faults": [asdict(fault) for fault in faults],
    }


def check_faults(found: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError, with counts by source, examples and what to do, if a `report` has faults; it is in `folder`."""
    faults = found["faults"]
    if not faults:
        return
    counts = ", ".join(
        f"{source}: {count}" for source, count in sorted(Counter(fault["source"] for fault in faults).items())
    )
    files, rows = found["all"]["broken_files"], found["all"]["too_long"]
    lines = [
        f"{files} files of the subset can't be read and {rows} rows are too long ({counts}). First ones:"
    ]
    lines += [f"  {fault['id']}: {fault['reason']}" for fault in faults[:NUM_EXAMPLES]]
    if files:
        lines.append("Put the files back; or remove them and run `make data` again, which fetches them anew.")
    if rows:
        room = found["fitting_max_tokens"]
        cure = f"data.max_tokens={room} or " if room > 0 else ""
        lines.append(f"For the rows that are too long, set {cure}a smaller reducer.budget.")
    raise UserError("\n".join([*lines, f"All of them are in {folder / 'check.json'}."]))
