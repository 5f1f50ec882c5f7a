"""Micro batches of a run's examples, in an order that depends on seed and step alone."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batches.collate import Collator, MicroBatch, Packer
from data.batches.packing import MicroBatchSpec, pack
from data.batches.workers import outlive_stops, usable_workers
from data.examples.tokens import Example, Examples
from vzip import UserError


def has_media(examples: Examples) -> Tensor:
    """bool[examples]: whether an example has an image or a video."""
    num_media = examples.column("num_images") + examples.column("num_videos")
    return torch.from_numpy(num_media > 0)


@dataclass(frozen=True)
class BatchPlan:
    """The steps of a run. The examples of a step do not depend on how it is cut."""

    size: int
    """Examples of a step, on all ranks together."""
    world_size: int
    """Number of ranks."""
    num_steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.num_steps:,} steps of {self.size} examples"


class Batcher(Protocol):
    """Cuts the examples of a step into micro batches."""

    examples: Examples
    collators: Sequence[Callable[[Sequence[Example]], MicroBatch]]
    """By number of the reducer: builds a micro batch from its examples."""
    lengths: Tensor
    """int64[reducers, examples]: tokens of each example after expansion, run or not."""

    def cut(self, step: int, examples: Sequence[int]) -> list[MicroBatchSpec]:
        """Cut a step into micro batches, the same number for every rank.

        Rank r takes numbers r, r + world_size, ... of them.
        """
        ...


class PaddedBatcher:
    """Micro batches of examples of similar length, padded to the longest one.

    The longest examples of a step come first, so its first micro batch needs the most memory. The
    loss is a sum over the examples of the step, so their order does not change it.

    Args:
        collator: expands and pads.
        examples: the examples of the run.
        plan: its steps.
        micro: examples of a micro batch.
    """

    def __init__(self, collator: Collator, examples: Examples, plan: BatchPlan, *, micro: int) -> None:
        self.collators = (collator,)
        self.examples = examples
        self.plan = plan
        self.micro = micro
        self.lengths = collator.lengths(examples)[None]

    def cut(self, step: int, examples: Sequence[int]) -> list[MicroBatchSpec]:
        """Cut a step into micro batches of `micro` examples, the longest examples first."""
        # A stable sort leaves examples of equal length in the drawn order.
        lengths = self.lengths[0, torch.tensor(examples)]
        longest_first = lengths.argsort(descending=True, stable=True)
        ordered = [examples[position] for position in longest_first.tolist()]

        specs = []
        for start in range(0, len(ordered), self.micro):
            specs.append(MicroBatchSpec(ordered[start : start + self.micro]))

        # The ranks run one micro batch each at the same time, and number i belongs to rank
        # i % world_size. Every second round is reversed, so that no rank always has the longest.
        in_turns: list[MicroBatchSpec] = []
        for number, start in enumerate(range(0, len(specs), self.plan.world_size)):
            one_per_rank = specs[start : start + self.plan.world_size]
            in_turns += one_per_rank[::-1] if number % 2 else one_per_rank

        return in_turns

    def __str__(self) -> str:
        plan = self.plan
        rounds = plan.size // self.micro // plan.world_size
        return f"{plan} = {self.micro} micro x {rounds} accumulation x {plan.world_size} ranks, padded"


class PackedBatcher:
    """Micro batches of at most `tokens` tokens, whose examples lie one behind the other.

    See `data.batches.packing.pack`.

    Args:
        packers: one per reducer.
        examples: the examples of the run.
        plan: its steps.
        tokens: tokens of a micro batch.
        num_run: int64[reducers, examples], tokens of each example that are run.
        has_gradient: bool[examples], whether the trainable parts learn from an example. Only such
            examples are run.
    """

    def __init__(
        self,
        packers: Sequence[Packer],
        examples: Examples,
        plan: BatchPlan,
        *,
        tokens: int,
        num_run: Tensor,
        has_gradient: Tensor,
    ) -> None:
        self.collators = packers
        self.examples = examples
        self.plan = plan
        self.tokens = tokens
        self.num_run = num_run.numpy()
        self.has_gradient = has_gradient.numpy()
        self.lengths = torch.stack([packer.collator.lengths(examples) for packer in packers])

    def cut(self, step: int, examples: Sequence[int]) -> list[MicroBatchSpec]:
        """Pack the examples of a step that have a gradient."""
        # An example without a gradient counts in the loss's denominator, but need not be run.
        run = [example for example in examples if self.has_gradient[example]]
        return pack(
            run,
            self.num_run,
            tokens=self.tokens,
            world_size=self.plan.world_size,
            seed=(self.plan.seed, step),
        )

    def __str__(self) -> str:
        plan = self.plan
        num_budgets = len(self.collators)
        drawn = f", each with one of {num_budgets} budgets" if num_budgets > 1 else ""
        return (
            f"{plan} on {plan.world_size} rank(s), "
            f"in micro batches of at most {self.tokens:,} packed tokens{drawn}"
        )


class MicroBatches(Dataset[MicroBatch]):
    """The micro batches of one rank, step after step.

    Args:
        batcher: cuts steps into micro batches.
        plan: the steps.
        rank: the rank whose micro batches these are.
        has_gradient: bool[examples], whether the trainable parts learn from an example. A projector
            learns nothing from text alone.
    """

    def __init__(self, batcher: Batcher, plan: BatchPlan, *, rank: int, has_gradient: Tensor) -> None:
        self.batcher = batcher
        self.plan = plan
        self.has_gradient = has_gradient

        self.examples_by_step = _draw_order(len(batcher.examples), plan)
        """int64[num_steps, size]: numbers of the examples of each step."""

        # Each rank cuts the steps for all ranks, and keeps its own share.
        specs_by_step = _cut_steps(batcher, self.examples_by_step)
        self._specs = _own_micro_batches(specs_by_step, rank=rank, world_size=plan.world_size)
        num_per_rank = [len(specs) // plan.world_size for specs in specs_by_step]
        self._first_indices = list(accumulate(num_per_rank, initial=0))

        # The loss is divided by the labels of the whole step, but a rank sees only its own share.
        num_labels = batcher.examples.column("num_labels").astype(np.int64)
        self._num_labels = torch.from_numpy(num_labels)
        self._num_tokens = _count_tokens(batcher.lengths, self.examples_by_step, specs_by_step)

    def __len__(self) -> int:
        return len(self._specs)

    def first_index(self, step: int) -> int:
        """Return the index of this rank's first micro batch of a step."""
        return self._first_indices[step]

    def num_micro_batches(self, step: int) -> int:
        """Count the micro batches of a step. Every rank has the same number."""
        return self._first_indices[step + 1] - self._first_indices[step]

    def num_labels(self, step: int) -> int:
        """Count the label tokens of the whole step, on all ranks."""
        return int(self._num_labels[self.examples_by_step[step]].sum())

    def num_grad_labels(self, step: int) -> int:
        """Count the label tokens of the step's examples that have a gradient, on all ranks."""
        examples = self.examples_by_step[step]
        return int(self._num_labels[examples][self.has_gradient[examples]].sum())

    def num_tokens(self, step: int) -> int:
        """Count the tokens of the step on all ranks, after expansion and without padding."""
        return self._num_tokens[step]

    def __getitem__(self, index: int) -> MicroBatch:
        spec = self._specs[index]
        collator = self.batcher.collators[spec.reducer]
        return collator([self.batcher.examples[example] for example in spec.examples])


def _draw_order(num_examples: int, plan: BatchPlan) -> Tensor:
    """int64[num_steps, size]: the examples of each step, cut from an endless stream of epochs.

    Each epoch is a permutation drawn from the seed and its number, so that the stream depends on
    nothing else.
    """
    # Rounded up: the last epoch is cut where the run ends.
    num_drawn = plan.num_steps * plan.size
    num_epochs = -(-num_drawn // num_examples)

    epochs = []
    for epoch in range(num_epochs):
        # A generator of its own, because other code draws from torch's global one too. The factor
        # keeps the epochs of one seed apart from those of the next.
        generator = torch.Generator().manual_seed(plan.seed * 100_003 + epoch)
        epochs.append(torch.randperm(num_examples, generator=generator))

    return torch.cat(epochs)[:num_drawn].view(plan.num_steps, plan.size)


def _cut_steps(batcher: Batcher, examples_by_step: Tensor) -> list[list[MicroBatchSpec]]:
    """Cut each step into the micro batches of all ranks."""
    return [batcher.cut(step, examples) for step, examples in enumerate(examples_by_step.tolist())]


def _own_micro_batches(
    specs_by_step: Sequence[Sequence[MicroBatchSpec]], *, rank: int, world_size: int
) -> list[MicroBatchSpec]:
    """Take a rank's micro batches of all steps: rank, rank + world_size, ... of each step."""
    own: list[MicroBatchSpec] = []
    for specs in specs_by_step:
        own += specs[rank::world_size]
    return own


def _count_tokens(
    lengths: Tensor, examples_by_step: Tensor, specs_by_step: Sequence[Sequence[MicroBatchSpec]]
) -> list[int]:
    """Count the tokens of each step on all ranks, expanded by each micro batch's reducer."""
    totals = []
    for examples, specs in zip(examples_by_step, specs_by_step, strict=True):
        # Count all examples with the first reducer, even those that are in no micro batch.
        total = int(lengths[0, examples].sum())

        # Then correct the micro batches of the other reducers.
        for spec in specs:
            if spec.reducer:
                difference = lengths[spec.reducer, spec.examples] - lengths[0, spec.examples]
                total += int(difference.sum())
        totals.append(total)
    return totals


@contextmanager
def explain_workers() -> Iterator[None]:
    """Turn faults of data workers into UserError.

    Put it around whatever waits for workers, and around whatever runs beside them: the end of a
    worker can interrupt it.
    """
    try:
        yield
    except (UserError, RuntimeError) as error:
        if isinstance(error, UserError):
            # The message of a worker's error begins with the worker's traceback.
            message = str(error).rsplit("UserError: ", 1)[-1].strip()
        elif "DataLoader worker" in str(error):
            message = (
                f"a process that loads data was ended from outside, mostly because memory ran out "
                f"({str(error).strip()}); lower data.num_workers, or give the machine (in a container "
                f"also /dev/shm) more memory, and run the same command again: it resumes"
            )
        else:
            raise

        # The traceback's frames hold torch's loader. Its other workers end only when it is freed.
        traceback.clear_frames(error.__traceback__)
        raise UserError(message) from None


def loader(batches: MicroBatches, *, first: int, num_workers: int) -> Iterator[MicroBatch]:
    """Yield micro batches from step `first` on, which worker processes build ahead of time.

    Each worker has one thread and works two batches ahead. They lie in shared memory, which is
    pinned if there is a GPU. Without workers this process builds them.

    Args:
        batches: the micro batches of this rank.
        first: the step to begin with.
        num_workers: worker processes. No more are started than there are CPUs.

    Raises:
        UserError: an image or video can't be read any more, or the system has ended a worker.
    """
    # batch_size=None: an item is a whole micro batch already.
    with explain_workers():
        yield from DataLoader(
            batches,
            batch_size=None,
            sampler=range(batches.first_index(first), len(batches)),
            num_workers=usable_workers(num_workers),
            worker_init_fn=outlive_stops,
            pin_memory=torch.cuda.is_available(),
        )
