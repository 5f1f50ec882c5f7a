"""Hypothesis strategies of tokenized examples, whose pictures need not exist."""

from functools import cache

from hypothesis import strategies as st

from data.batches.collate import Collator
from data.examples.tokens import Example, Examples
from tests.helpers import tiny
from tests.helpers.examples import IMAGE_ID, ReadyMedia, shared_family
from vzip.reducers.random import Random
from vzip.templates.encode import IGNORED

STARTS = [[1, 40, 41, 42], [1, 40, 41], [1, 40, 41, 42, 43], [1, 40, 9, 42]]
"""Ids that an example begins with: mostly alike."""


@cache
def ready_collator(num_tokens=2):
    """A collator whose pictures are features already, `num_tokens` each."""
    media = ReadyMedia(num_tokens)
    return Collator(tiny.processor(), shared_family(), Random(budget=num_tokens), media=media)


@st.composite
def bodies(draw, *, pictures=True):
    """(ids, labels) as a template gives them: a start without labels, turns, an answer, and something
    behind it.
    """
    words = st.sampled_from([IMAGE_ID, 50, 51, 52] if pictures else [50, 51, 52])
    ids = list(draw(st.sampled_from(STARTS)))
    labels = [IGNORED] * len(ids)

    for token, is_label in draw(st.lists(st.tuples(words, st.booleans()), max_size=10)):
        ids.append(token)
        labels.append(token if is_label and token != IMAGE_ID else IGNORED)

    behind = draw(st.lists(words, max_size=3))
    return [*ids, 60, *behind], [*labels, 60, *[IGNORED] * len(behind)]


def example_with_pictures(ids, labels, index=0):
    """An example with as many pictures as it has placeholders."""
    pictures = tuple(f"{index}-{number}.png" for number in range(ids.count(IMAGE_ID)))
    media = {"image": pictures} if pictures else {}
    return Example(ids, labels, media, sizes=((50, 50),) * len(pictures), index=index)


def examples_from(pairs):
    """Examples of some (ids, labels)."""
    return Examples.of(example_with_pictures(*pair, index) for index, pair in enumerate(pairs))


def drawn_examples():
    """Examples with and without pictures, most of which begin alike."""
    return st.lists(bodies(), min_size=1, max_size=8).map(examples_from)
