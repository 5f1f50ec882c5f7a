"""A global batch is cut into equal micro batches on every rank."""

from dataclasses import replace

import pytest

from data.batches.collate import Collator
from data.batches.dataset import BatchPlan, MicroBatches, PaddedBatcher, has_media
from data.examples.tokens import Example, Examples
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.examples import shared_family
from train.config import batch_plan
from vzip.reducers.identity import Identity


@pytest.mark.parametrize(
    ("size", "micro", "world_size", "accumulation"),
    [(128, 16, 1, 8), (128, 16, 8, 1), (16, 8, 2, 1), (12, 2, 3, 2), (1, 1, 1, 1)],
)
def test_a_global_batch_is_cut_exactly(size, micro, world_size, accumulation):
    cfg = composed("engine=reference", f"batch.size={size}", f"batch.micro={micro}", "seed=5")
    plan = batch_plan(cfg, num_examples=1000, world_size=world_size)
    assert plan == BatchPlan(size=size, world_size=world_size, num_steps=max(1, round(1000 / size)), seed=5)

    examples = Examples.of(Example([7] * length, [7] * length, {}) for length in range(1, 151))
    short = replace(plan, num_steps=2)
    collator = Collator(tiny.processor(), shared_family(), Identity())
    batcher = PaddedBatcher(collator, examples, short, micro=micro)
    for rank in range(world_size):
        batches = MicroBatches(batcher, short, rank=rank, has_gradient=has_media(examples))
        assert len(batches) == 2 * accumulation == 2 * batches.num_micro_batches(0)
        assert {len(batches[index].input_ids) for index in range(len(batches))} == {micro}
