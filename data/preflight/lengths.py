"""Measure how long the examples of a subset are.

Lengths follow from the token arrays and the recorded sizes of images, so no image is opened.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa

from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED

MEASURES = {
    "text": "text tokens",
    "visual": "visual tokens",
    "expanded": "tokens in the language model",
    "labels": "label tokens",
}
"""The columns of `ExampleLengths` that a report describes, with their titles."""


@dataclass(frozen=True)
class ExampleLengths:
    """Lengths of a subset's conversations in columns, int64[conversations] unless noted.

    Conversations that the cut left without a label are included.
    """

    ids: np.ndarray
    """str[conversations]."""
    sources: np.ndarray
    """str[conversations]."""
    media: np.ndarray
    """Number of images and videos."""
    text: np.ndarray
    """Tokens after the cut, without placeholders."""
    visual: np.ndarray
    """Visual tokens that replace the placeholders."""
    labels: np.ndarray
    """Label tokens after the cut."""
    whole_labels: np.ndarray
    """Label tokens before the cut."""
    cut_turns: np.ndarray
    """Number, from 1, of the turn in which the conversation was cut. 0 if it was not cut."""

    @property
    def expanded(self) -> np.ndarray:
        """Tokens that enter the language model."""
        tokens: np.ndarray = self.text + self.visual
        return tokens

    @property
    def trained(self) -> np.ndarray:
        """bool[conversations]: whether a conversation has a label, and so is an example."""
        has_labels: np.ndarray = self.labels > 0
        return has_labels


def measure_lengths(
    table: pa.Table, family: Family, reducer: Reducer, *, num_frames: int = 1
) -> ExampleLengths:
    """Measure the lengths of tokenized conversations.

    Args:
        table: the columns of `data.examples.tokens.SCHEMA`.
        family: the model's family, which may be without weights.
        reducer: the reducer that the visual tokens are counted for.
        num_frames: frames taken of a video.

    Raises:
        UserError: the budget does not fit the model, or there are videos and the model takes none.
    """
    num_tokens = table["num_tokens"].to_numpy()
    num_media = table["num_images"].to_numpy() + table["num_videos"].to_numpy()

    # Look at the labels only of conversations that were cut: reading all of them takes seconds.
    cut_turns = np.zeros(len(table), dtype=np.int64)
    was_cut = table["num_whole_tokens"].to_numpy() > num_tokens
    for row in np.flatnonzero(was_cut).tolist():
        cut_turns[row] = _last_turn(table["labels"][row].values.to_numpy())

    return ExampleLengths(
        ids=table["id"].to_numpy(),
        sources=table["source"].to_numpy(),
        media=num_media,
        text=num_tokens - num_media,
        visual=_visual_tokens(table, family, reducer, num_frames),
        labels=table["num_labels"].to_numpy(),
        whole_labels=table["num_whole_labels"].to_numpy(),
        cut_turns=cut_turns,
    )


def _visual_tokens(table: pa.Table, family: Family, reducer: Reducer, num_frames: int) -> np.ndarray:
    """int64[conversations]: count the visual tokens of each conversation."""

    # Many conversations have images of the same sizes, so each combination is counted once.
    @cache
    def count(sides: tuple[int, ...]) -> int:
        sizes = list(zip(sides[::2], sides[1::2], strict=True))
        return family.num_example_tokens(reducer, sizes)

    visual = np.array([count(tuple(sides)) for sides in table["sizes"].to_pylist()], dtype=np.int64)

    # Only if there are videos: most families take none, and raise an error when asked.
    num_videos = table["num_videos"].to_numpy()
    if num_videos.any():
        visual = visual + num_videos * family.num_video_tokens(reducer, num_frames)

    return visual


def _last_turn(labels: np.ndarray) -> int:
    """Find the turn in which a cut conversation ends, from its labels int32[tokens]."""
    # Only answers carry loss, so an answer begins where a label follows a token without one.
    carries_loss = labels != IGNORED
    begins_answer = np.diff(carries_loss, prepend=False) & carries_loss
    num_answers_begun = int(np.count_nonzero(begins_answer))

    # If the last token carries no loss, the cut fell in the question behind the last answer.
    return num_answers_begun if carries_loss[-1] else num_answers_begun + 1
