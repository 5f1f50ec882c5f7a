"""How long the examples of a subset are.

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
"""Columns of `ExampleLengths` that reports describe, with their titles."""


@dataclass(frozen=True)
class ExampleLengths:
    """Lengths of a subset's conversations in columns, int64[conversations] unless noted.

    Conversations that the cut left without a label are among them.
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
    """Tokens that the placeholders become."""
    labels: np.ndarray
    """Label tokens after the cut."""
    whole_labels: np.ndarray
    """Label tokens before the cut."""
    cut_turns: np.ndarray
    """The turn, from 1, in whose question or answer the conversation was cut. 0 if it was not."""

    @property
    def expanded(self) -> np.ndarray:
        """Tokens that the language model gets."""
        tokens: np.ndarray = self.text + self.visual
        return tokens

    @property
    def trained(self) -> np.ndarray:
        """bool[conversations]: whether a conversation has a label. Only then is it an example."""
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

    # Only conversations that were cut need a look at their labels.
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
    """int64[conversations]: tokens that the images and videos of each one become."""

    # Many conversations have images of the same sizes.
    @cache
    def count(sides: tuple[int, ...]) -> int:
        sizes = list(zip(sides[::2], sides[1::2], strict=True))
        return family.num_example_tokens(reducer, sizes)

    visual = np.array([count(tuple(sides)) for sides in table["sizes"].to_pylist()], dtype=np.int64)

    # Asked only if there are videos, as most families take none and raise an error.
    num_videos = table["num_videos"].to_numpy()
    if num_videos.any():
        visual = visual + num_videos * family.num_video_tokens(reducer, num_frames)

    return visual


def _last_turn(labels: np.ndarray) -> int:
    """The turn that a cut conversation ends in, from its labels int32[tokens]."""
    carries_loss = labels != IGNORED
    begins_answer = np.diff(carries_loss, prepend=False) & carries_loss
    num_answers_begun = int(np.count_nonzero(begins_answer))

    # A conversation that does not end in an answer ends in the question behind the last one.
    return num_answers_begun if carries_loss[-1] else num_answers_begun + 1
