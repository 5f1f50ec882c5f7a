"""Which tokens are run, and which examples share a micro batch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.batches.packing import num_tail_tokens, pack, shared_prefix
from tests.helpers.examples import IMAGE_ID
from tests.helpers.strategies import drawn_examples
from vzip.templates.encode import IGNORED

# Which tokens are run


def slow_num_tail_tokens(example):
    """The tail, token by token: a token is needed if it is an image's, or if a label follows it or a
    later one.
    """
    num_tail = 0
    following = [*example.labels[1:], IGNORED]
    for token, label in zip(reversed(example.ids), reversed(following), strict=True):
        if label != IGNORED or token == IMAGE_ID:
            break
        num_tail += 1
    return num_tail


def slow_shared_prefix(examples):
    """The prefix, token by token."""
    with_images = [example for example in examples if IMAGE_ID in example.ids]
    prefix = []
    for position, tokens in enumerate(zip(*(example.ids for example in with_images), strict=False)):
        labels = {label for example in with_images for label in example.labels[position : position + 2]}
        if len(set(tokens)) > 1 or tokens[0] == IMAGE_ID or labels != {IGNORED}:
            break
        prefix.append(tokens[0])
    return prefix


@given(drawn_examples())
def test_tail_and_prefix_are_those_found_token_by_token(examples):
    tails = num_tail_tokens(examples.flat_tokens(), [IMAGE_ID])
    assert tails.tolist() == [slow_num_tail_tokens(example) for example in examples]
    assert shared_prefix(examples, [IMAGE_ID]) == slow_shared_prefix(examples)


# Which examples share a micro batch


@st.composite
def packings(draw):
    """(examples, lengths by reducer of these and other examples, tokens, ranks)."""
    num_examples = draw(st.integers(0, 30))
    num_reducers = draw(st.integers(1, 3))
    column = st.lists(st.integers(1, 60), min_size=num_examples + 5, max_size=num_examples + 5)
    lengths = draw(st.lists(column, min_size=num_reducers, max_size=num_reducers))
    examples = draw(st.permutations(range(num_examples + 5)))[:num_examples]
    return examples, np.array(lengths), draw(st.integers(1, 200)), draw(st.integers(1, 4))


def loads_of(specs, lengths):
    return [int(lengths[spec.reducer, spec.examples].sum()) for spec in specs]


@given(packings())
def test_each_example_is_packed_once_and_no_micro_batch_is_too_large(packing):
    examples, lengths, tokens, world_size = packing
    specs = pack(examples, lengths, tokens=tokens, world_size=world_size, seed=(0, 7))
    loads = loads_of(specs, lengths)

    assert sorted(example for spec in specs for example in spec.examples) == sorted(examples)
    assert all(load <= tokens or len(spec.examples) == 1 for load, spec in zip(loads, specs, strict=True))
    assert specs
    assert len(specs) % world_size == 0
    assert max(loads) - min(loads) <= lengths[:, examples].max(initial=0)
    assert all(0 <= spec.reducer < len(lengths) for spec in specs)

    for spec in specs:
        longest = lengths[:, spec.examples].max(axis=0).tolist()
        assert longest == sorted(longest, reverse=True)

    # The order in which they are given does not matter.
    assert pack(examples[::-1], lengths, tokens=tokens, world_size=world_size, seed=(0, 7)) == specs


def test_there_are_as_few_micro_batches_as_the_tokens_need():
    lengths = np.array([[60, 50, 40, 30, 20]])

    def num_micro_batches(tokens, world_size=1):
        return len(pack(range(5), lengths, tokens=tokens, world_size=world_size, seed=(0, 0)))

    expected = {200: 1, 199: 2, 110: 2, 109: 3, 70: 3, 69: 4, 59: 4, 1: 5}
    assert {tokens: num_micro_batches(tokens) for tokens in expected} == expected
    assert num_micro_batches(110, world_size=2) == 2
    assert num_micro_batches(109, world_size=2) == 4
    assert num_micro_batches(200, world_size=4) == 4


def test_the_loads_of_ranks_are_similar():
    generator = np.random.default_rng(0)
    lengths = (120 * np.exp(0.6 * generator.normal(size=(1, 128)))).astype(int).clip(20, 900)
    for tokens in (2048, 4096, 16_384):
        loads = loads_of(pack(range(128), lengths, tokens=tokens, world_size=4, seed=(0, 0)), lengths)
        assert max(loads) < 1.05 * min(loads)


def test_reducers_are_drawn_from_seed_and_step():
    lengths = np.array([[10] * 40, [20] * 40, [15] * 40])

    def drawn(*seed):
        specs = pack(range(40), lengths, tokens=40, world_size=2, seed=seed)
        return tuple(spec.reducer for spec in specs)

    assert {*drawn(0, 0)} == {0, 1, 2}
    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(seed, step) for seed in (0, 1, -1) for step in (0, 1)}) == 6
