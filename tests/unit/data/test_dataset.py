"""The order of examples, the micro batches of all ranks, resuming, and data workers."""

import multiprocessing
import os
import signal
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

from data.batches.collate import Collator, Packer
from data.batches.dataset import (
    BatchPlan,
    MicroBatches,
    PackedBatcher,
    explain_workers,
    has_media,
    loader,
    usable_workers,
)
from data.batches.packing import shared_prefix
from data.examples.tokens import Example, Examples
from tests.helpers import tiny
from tests.helpers.examples import (
    IMAGE_ID,
    ReadyMedia,
    are_equal,
    examples_of,
    micro_batches_of,
    padded_batches,
    shared_family,
)
from tests.helpers.strategies import bodies, examples_from, ready_collator
from vzip import UserError
from vzip.families.features import VisualFeatures
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED

PROCESSOR = tiny.processor()
SPLITS = [
    (micro, accumulation, 8 // micro // accumulation)
    for micro in (1, 2, 4, 8)
    for accumulation in (1, 2, 4, 8)
    if micro * accumulation <= 8
]
"""All (examples of a micro batch, micro batches of a rank, ranks) that make up a step of 8 examples."""
FIRST_NUMBER = 100_000
"""From here on, ids that only one example has."""


def collator(media=None):
    return Collator(PROCESSOR, shared_family(), VisionZip(dominant=5, contextual=1), media=media)


def text_examples(lengths):
    """Text of these lengths with 1, 2 or 3 label tokens. The first id tells the example."""
    examples = []
    for number, length in enumerate(lengths):
        num_labels = 1 + number % 3
        labels = [*[IGNORED] * (length - num_labels), *[7] * num_labels]
        examples.append(Example([FIRST_NUMBER + number, *[7] * (length - 1)], labels, {}))
    return Examples.of(examples)


def mixed_lengths(count):
    """Lengths like those of instruction data: half of them below 280 tokens, a tenth above 600."""
    generator = torch.Generator().manual_seed(0)
    lengths = 280 * torch.exp(0.6 * torch.randn(count, generator=generator))
    return lengths.long().clamp(35, 2048).tolist()


def all_ranks(examples, split, *, num_steps, seed=0):
    micro, accumulation, world_size = split
    settings = {"accumulation": accumulation, "world_size": world_size, "num_steps": num_steps, "seed": seed}
    return [
        padded_batches(examples, collator(), micro=micro, **settings, rank=rank) for rank in range(world_size)
    ]


def numbers_of(batch):
    """Numbers of the examples of `text_examples` in a micro batch."""
    return (batch.input_ids[:, 0] - FIRST_NUMBER).tolist()


# The order of examples


@given(
    split=st.sampled_from(SPLITS),
    count=st.integers(3, 20),
    seed=st.integers(0, 3),
    num_steps=st.integers(1, 4),
)
def test_every_split_of_a_step_takes_the_same_examples_and_counts_the_same(split, count, seed, num_steps):
    examples = text_examples([4 + number % 5 for number in range(count)])
    (whole,) = all_ranks(examples, (8, 1, 1), num_steps=num_steps, seed=seed)
    ranks = all_ranks(examples, split, num_steps=num_steps, seed=seed)
    for step in range(num_steps):
        batches = []
        for rank in ranks:
            assert rank.num_micro_batches(step) == split[1]
            batches += micro_batches_of(rank, step)

        taken = sorted(number for batch in batches for number in numbers_of(batch))
        assert taken == sorted(numbers_of(whole[step]))
        num_labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        num_tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        for rank in ranks:
            assert rank.num_labels(step) == num_labels
            assert rank.num_tokens(step) == num_tokens
            assert rank.num_grad_labels(step) == 0  # text alone


@pytest.mark.parametrize("count", [24, 20])
def test_an_epoch_sees_every_example_once_and_the_next_one_in_another_order(count):
    examples = text_examples([4] * count)
    (batches,) = all_ranks(examples, (4, 1, 1), num_steps=15)
    stream = batches.examples_by_step.flatten().tolist()
    epochs = [stream[start : start + count] for start in range(0, 60 - count + 1, count)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)

    taken = []
    for step in range(count // 4):
        taken += numbers_of(batches[step])
    assert sorted(taken) == list(range(count))

    # The order is a function of the seed, and of no other draws.
    torch.manual_seed(99)
    (same,) = all_ranks(examples, (4, 1, 1), num_steps=15)
    (other,) = all_ranks(examples, (4, 1, 1), num_steps=15, seed=4)
    assert torch.equal(same.examples_by_step, batches.examples_by_step)
    assert not torch.equal(other.examples_by_step, batches.examples_by_step)


@pytest.mark.parametrize("split", SPLITS)
def test_micro_batches_hold_similar_lengths_the_longest_first(split):
    micro, accumulation, _ = split
    ranks = all_ranks(text_examples(mixed_lengths(48)), split, num_steps=3)
    for step in range(3):
        # The micro batches that the ranks run at the same time hold neighbouring lengths.
        rounds = list(zip(*(micro_batches_of(rank, step) for rank in ranks), strict=True))
        assert len(rounds) == accumulation
        lengths = []
        for batches in rounds:
            assert all(len(batch.input_ids) == micro for batch in batches)
            lengths.append(sorted(int(n) for batch in batches for n in batch.attention_mask.sum(dim=1)))
        assert all(longer[0] >= shorter[-1] for longer, shorter in pairwise(lengths))


def test_no_rank_has_the_longest_examples_of_every_round():
    # No rank could make up for one example that is longer than all others.
    lengths = torch.tensor(mixed_lengths(512)).clamp(max=600)
    ranks = all_ranks(text_examples(lengths.tolist()), (2, 8, 8), num_steps=4)
    totals = []
    for rank in ranks:
        totals.append(sum(int(rank[index].attention_mask.sum()) for index in range(len(rank))))

    longest_first = lengths[ranks[0].examples_by_step].sort(dim=1, descending=True).values
    without_turns = longest_first.view(4 * 8, 8, 2).sum(dim=(0, 2)).tolist()
    assert max(totals) / min(totals) < 1.05 < max(without_turns) / min(without_turns)


# Packed steps


def packed_ranks(
    examples, *, world_size, tokens=60, num_steps=3, text_has_gradient=False, num_image_tokens=(2,)
):
    """The packed micro batches of all ranks, with a budget for each entry of `num_image_tokens`."""
    plan = BatchPlan(size=6, world_size=world_size, num_steps=num_steps, seed=3)
    prefix = [] if text_has_gradient else shared_prefix(examples, [IMAGE_ID])
    packers = []
    for number, num_tokens in enumerate(num_image_tokens):
        packers.append(Packer(ready_collator(num_tokens), num_prefix=len(prefix), reducer=number))

    num_run = torch.stack([packer.lengths(examples) for packer in packers])
    has_gradient = has_media(examples) | text_has_gradient
    batcher = PackedBatcher(
        packers, examples, plan, tokens=tokens, num_run=num_run, has_gradient=has_gradient
    )
    return [MicroBatches(batcher, plan, rank=rank, has_gradient=has_gradient) for rank in range(world_size)]


@st.composite
def numbered_examples(draw):
    """Examples that hold their own number as a label, the last one with a picture."""
    pairs = draw(st.lists(st.one_of(bodies(), bodies(pictures=False)), max_size=9))
    pairs.append(([1, IMAGE_ID, 6], [IGNORED, IGNORED, 6]))

    numbered = []
    for number, (ids, labels) in enumerate(pairs):
        own = FIRST_NUMBER + number
        numbered.append(([*ids[:-1], own, ids[-1]], [*labels[:-1], own, labels[-1]]))
    return examples_from(numbered)


@given(numbered_examples(), st.integers(1, 3), st.sampled_from([1, 40, 1000]), st.booleans())
def test_all_ranks_together_run_each_example_with_a_gradient_once(
    examples, world_size, tokens, text_has_gradient
):
    ranks = packed_ranks(examples, world_size=world_size, tokens=tokens, text_has_gradient=text_has_gradient)
    padded = padded_batches(examples, ready_collator(), micro=6, num_steps=3, seed=3)
    assert torch.equal(ranks[0].examples_by_step, padded.examples_by_step)
    num_prefix = 0 if text_has_gradient else len(shared_prefix(examples, [IMAGE_ID]))
    lengths = Packer(ready_collator(), num_prefix=num_prefix).lengths(examples)

    for step, numbers in enumerate(padded.examples_by_step.tolist()):
        run = [number for number in numbers if text_has_gradient or examples[number].media]
        batches = []
        for rank in ranks:
            assert rank.num_micro_batches(step) == ranks[0].num_micro_batches(step) >= 1
            batches += micro_batches_of(rank, step)

        learned = []
        num_targets = num_tokens = 0
        for batch in batches:
            num_tokens += sum(batch.lengths) if batch.num_examples else 0
            assert batch.num_examples < 2 or len(batch.input_ids) == sum(batch.lengths) <= tokens
            learned += [token - FIRST_NUMBER for token in batch.targets.tolist() if token >= FIRST_NUMBER]
            num_targets += len(batch.targets) if batch.num_examples else 0
        assert num_tokens == lengths[run].sum()
        assert sorted(learned) == sorted(run)
        assert sum(batch.num_examples for batch in batches) == len(run)

        for rank in ranks:
            assert rank.num_grad_labels(step) == num_targets
            assert rank.num_grad_labels(step) == sum(examples[number].num_labels for number in run)
            assert rank.num_labels(step) == padded.num_labels(step)
            assert rank.num_tokens(step) == padded.num_tokens(step)

    assert all(len(rank) == sum(rank.num_micro_batches(step) for step in range(3)) for rank in ranks)


@given(numbered_examples(), st.integers(0, 3))
def test_a_run_resumes_with_the_same_micro_batches(examples, step):
    settings = {"world_size": 2, "num_image_tokens": (2, 3)}
    ranks = packed_ranks(examples, **settings)
    for rank, resumed in zip(ranks, packed_ranks(examples, **settings), strict=True):
        whole = list(loader(rank, first=0, num_workers=0))
        rest = list(loader(resumed, first=step, num_workers=0))
        assert len(whole) == len(rank)
        assert len(rest) == len(whole) - rank.first_index(step)
        assert all(map(are_equal, whole[rank.first_index(step) :], rest))

    # A longer run begins with the same steps.
    longer = packed_ranks(examples, **settings, num_steps=5)
    assert all(map(are_equal, micro_batches_of(ranks[0], 2), micro_batches_of(longer[0], 2)))


def test_a_micro_batch_has_the_tokens_of_its_budget():
    examples = examples_from([([1, IMAGE_ID, 6], [IGNORED, IGNORED, 6])] * 6)
    (batches,) = packed_ranks(examples, world_size=1, tokens=12, num_image_tokens=(2, 5))
    drawn = set()
    for index in range(len(batches)):
        batch = batches[index]
        num_tokens = (2, 5)[batch.reducer]
        drawn.add(batch.reducer)
        assert len(batch.input_ids) <= 12
        assert batch.lengths == (num_tokens,) * batch.num_examples
        assert batch.num_placeholders["image"] == batch.num_examples * num_tokens
        assert len(batch.media["image"].features) == batch.num_placeholders["image"]
    assert drawn == {0, 1}

    # Tokens are counted by the budget that was drawn: the text tokens of six examples, and their images.
    for step in range(3):
        expected = 6 * 2
        for batch in micro_batches_of(batches, step):
            expected += batch.num_placeholders["image"]
        assert batches.num_tokens(step) == expected


# Workers


class CountingMedia(ReadyMedia):
    """Tells the number of the worker's threads, and of workers."""

    def blank(self, kind):
        counts = [torch.get_num_threads(), get_worker_info().num_workers]
        return VisualFeatures.in_order(torch.tensor(counts), num_media=1)


class KilledMedia(ReadyMedia):
    """The system ends the worker, as it does when memory runs out."""

    def blank(self, kind):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)


def text_batches(media):
    return padded_batches(text_examples([5] * 8), collator(media), micro=2, num_steps=4)


def test_a_worker_has_one_thread_and_there_are_no_more_workers_than_cpus(monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = list(loader(text_batches(CountingMedia()), first=0, num_workers=5))
    finally:
        torch.set_num_threads(num_threads)

    counts = {tuple(batch.media["image"].features.tolist()) for batch in batches}
    assert counts == {(1, 2)}
    assert [usable_workers(number) for number in (0, 1, 5)] == [0, 1, 2]
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_a_worker_that_the_system_ends_is_explained_and_nothing_is_waited_for():
    with pytest.raises(UserError, match=r"memory ran out.*data\.num_workers.*resumes"):
        list(loader(text_batches(KilledMedia()), first=0, num_workers=1))
    assert not multiprocessing.active_children()

    # It may end while the model computes.
    batches = iter(loader(text_batches(KilledMedia()), first=0, num_workers=1))
    with pytest.raises(UserError, match=r"memory ran out.*data\.num_workers"), explain_workers():
        next(batches)
        time.sleep(10)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="CUDA error") as error, explain_workers():
        raise RuntimeError("CUDA error: out of memory")
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_ends_and_resumes_where_a_picture_vanished(tmp_path, num_workers):
    examples = examples_of([f"<image>number {number}" for number in range(6)], tmp_path)
    with_files = Collator(PROCESSOR, shared_family(), Identity())
    batches = padded_batches(examples, with_files, micro=1, num_steps=6)
    (path,) = examples[batches.examples_by_step[3].item()].media["image"]
    path.unlink()

    seen = []
    with pytest.raises(UserError, match=rf"{path.name}.*resumes") as error:
        for batch in loader(batches, first=0, num_workers=num_workers):
            seen.append(batch)
    assert len(seen) == 3
    assert "Traceback" not in str(error.value)  # a worker's error comes with one in its message
    assert not multiprocessing.active_children()
    assert len(list(loader(batches, first=4, num_workers=num_workers))) == 2
    assert list(loader(batches, first=6, num_workers=num_workers)) == []
