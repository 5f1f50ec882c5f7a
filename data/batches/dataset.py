"""From the rows of a run to its micro batches, in an order that depends on seed and step alone."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batches.collate import Collator, MicroBatch, Packer
from data.batches.packing import MicroBatchSpec, pack
from data.examples.tokens import Example, Examples
from vzip import UserError


def _permutation(num_examples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def has_media(examples: Sequence[Example]) -> Tensor:
    """bool[rows]: whether a row has an image or a video."""
    if isinstance(examples, Examples):
        return torch.from_numpy(examples.column("num_images") + examples.column("num_videos") > 0)
    return torch.tensor([bool(example.media) for example in examples])


def _num_labels(examples: Sequence[Example]) -> Tensor:
    """int64[rows]: label tokens of each row."""
    if isinstance(examples, Examples):
        return torch.from_numpy(examples.column("num_labels")).long()
    return torch.tensor([example.num_labels for example in examples])


@dataclass(frozen=True)
class BatchPlan:
    """The steps of a run. Which rows a step takes does not depend on how they are cut into micro batches."""

    size: int
    """Rows of a step, on all ranks."""
    world_size: int
    num_steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.num_steps:,} steps of {self.size} rows"


class BatchLayout(Protocol):
    """How the rows of a step become micro batches."""

    examples: Sequence[Example]
    collates: Sequence[Callable[[Sequence[Example]], MicroBatch]]
    """What makes a micro batch of rows, by number of the reducer."""
    lengths: Tensor
    """int64[reducers, rows]: tokens of each row after expansion, all of them."""

    def parts(self, step: int, rows: Sequence[int]) -> list[MicroBatchSpec]:
        """The step's micro batches, as many on each rank: of each round one a rank, in turn."""
        ...


class PaddedLayout:
    """Rows of like length share a micro batch: within a step, whose loss is a sum over its rows in whatever order, the longest
    come first. The ranks' micro batches are alike too, and the step's largest need of memory is its first.

    Args:
        collate: pads.
        examples: the rows of the run.
        plan: its steps.
        micro: rows of a micro batch.
    """

    def __init__(
        self, collate: Collator, examples: Sequence[Example], plan: BatchPlan, *, micro: int
    ) -> None:
        self.collates, self.examples, self.plan, self.micro = (collate,), examples, plan, micro
        self.lengths = collate.lengths(examples)[None]

    def parts(self, step: int, rows: Sequence[int]) -> list[MicroBatchSpec]:
        """As `Layout.parts`."""
        order = self.lengths[0, torch.tensor(rows)].argsort(descending=True, stable=True).tolist()
        parts = [
            MicroBatchSpec([rows[place] for place in order[i : i + self.micro]])
            for i in range(0, len(rows), self.micro)
        ]
        rounds = [parts[i : i + self.plan.world_size] for i in range(0, len(parts), self.plan.world_size)]
        # The ranks take turns in having the longer rows, so that none has the longest of every round.
        return [
            part
            for number, of_ranks in enumerate(rounds)
            for part in (of_ranks[::-1] if number % 2 else of_ranks)
        ]

    def __str__(self) -> str:
        rounds = self.plan.size // self.micro // self.plan.world_size
        return (
            f"{self.plan} = {self.micro} micro x {rounds} accumulation x {self.plan.world_size} ranks, padded"
        )


class PackedLayout:
    """Rows lie one behind the other in micro batches of at most `tokens` tokens; see `data.batches.packing.pack`.

    Args:
        packers: one a reducer.
        examples: the rows of the run.
        plan: its steps.
        tokens: of a micro batch.
        num_run: int64[reducers, rows], tokens of each row that are run.
        taught: bool[rows], those to run.
    """

    def __init__(
        self,
        packers: Sequence[Packer],
        examples: Sequence[Example],
        plan: BatchPlan,
        *,
        tokens: int,
        num_run: Tensor,
        has_gradient: Tensor,
    ) -> None:
        self.collates, self.examples, self.plan, self.tokens = packers, examples, plan, tokens
        self.num_run, self.has_gradient = num_run.numpy(), has_gradient.numpy()
        self.lengths = torch.stack([packer.collate.lengths(examples) for packer in packers])

    def parts(self, step: int, rows: Sequence[int]) -> list[MicroBatchSpec]:
        """As `Layout.parts`."""
        run, seed = [row for row in rows if self.has_gradient[row]], (self.plan.seed, step)
        return pack(run, self.num_run, tokens=self.tokens, world_size=self.plan.world_size, seed=seed)

    def __str__(self) -> str:
        drawn = f", each of one of {len(self.collates)} budgets" if len(self.collates) > 1 else ""
        return f"{self.plan} on {self.plan.world_size} rank(s), in micro batches of at most {self.tokens:,} packed tokens{drawn}"


class MicroBatches(Dataset[MicroBatch]):
    """A rank's micro batches, step after step.

    Step s takes rows s * size ... of an endless stream of epochs, each a permutation drawn from seed and epoch.

    Args:
        layout: cuts steps into micro batches.
        plan: the steps.
        rank: whose micro batches these are.
        taught: bool[rows], the rows that the tuned parameters learn from; a text alone tells a projector nothing.
    """

    def __init__(self, layout: BatchLayout, plan: BatchPlan, *, rank: int, has_gradient: Tensor) -> None:
        self.layout, self.plan = layout, plan
        num_examples = len(layout.examples)
        num_epochs = -(-plan.num_steps * plan.size // num_examples)
        stream = torch.cat([_permutation(num_examples, plan.seed, epoch) for epoch in range(num_epochs)])
        self.rows = stream[: plan.num_steps * plan.size].view(plan.num_steps, plan.size)
        cuts = [layout.parts(step, rows) for step, rows in enumerate(self.rows.tolist())]
        self._starts = [0, *accumulate(len(parts) // plan.world_size for parts in cuts)]
        self._parts = [part for parts in cuts for part in parts[rank :: plan.world_size]]
        self._labels, self._has_gradient = _num_labels(layout.examples), has_gradient
        self._tokens = [self._num_tokens(rows, parts) for rows, parts in zip(self.rows, cuts, strict=True)]

    def _num_tokens(self, rows: Tensor, parts: Sequence[MicroBatchSpec]) -> int:
        lengths = self.layout.lengths
        drawn = sum(
            int((lengths[part.reducer][part.rows] - lengths[0][part.rows]).sum())
            for part in parts
            if part.reducer
        )
        return int(lengths[0, rows].sum()) + drawn

    def __len__(self) -> int:
        return len(self._parts)

    def num_before(self, step: int) -> int:
        """This rank's micro batches before a step."""
        return self._starts[step]

    def num_parts(self, step: int) -> int:
        """Micro batches of a step, the same number on every rank."""
        return self._starts[step + 1] - self._starts[step]

    def num_labels(self, step: int) -> int:
        """Label tokens of the whole global batch of a step, on all ranks."""
        return int(self._labels[self.rows[step]].sum())

    def num_grad_labels(self, step: int) -> int:
        """Those of the rows that are learned from."""
        rows = self.rows[step]
        return int(self._labels[rows][self._has_gradient[rows]].sum())

    def num_tokens(self, step: int) -> int:
        """Tokens of a step's rows on all ranks, after expansion and without padding."""
        return self._tokens[step]

    def __getitem__(self, index: int) -> MicroBatch:
        part = self._parts[index]
        return self.layout.collates[part.reducer]([self.layout.examples[row] for row in part.rows])


@contextmanager
def explain_workers() -> Iterator[None]:
    """Around what waits for workers, or may be interrupted by the end of one: their faults come out as UserError."""
    try:
        yield
    except (UserError, RuntimeError) as error:
        if isinstance(error, UserError):
            message = (
                str(error).rsplit("UserError: ", 1)[-1].strip()
            )  # a worker's comes with its traceback in the message
        elif "DataLoader worker" in str(error):
            message = (
                f"a process that loads data was ended from outside, mostly because memory ran out ({str(error).strip()}); "
                f"lower data.num_workers, or give the machine (in a container also /dev/shm) more memory, and run the same "
                f"command again: it resumes"
            )
        else:
            raise
        traceback.clear_frames(
            error.__traceback__
        )  # they hold torch's loader, which takes its workers along when it goes
        raise UserError(message) from None


def loader(batches: MicroBatches, *, first: int, num_workers: int) -> Iterator[MicroBatch]:
    """Micro batches from step `first` on, made by `num_workers` processes of one thread each (0: by this one).

    Each worker is two batches ahead, which lie in shared memory; pinned, where there is a GPU.

    Raises:
        UserError: a picture or video that can't be read any more, or a worker that the system has ended.
    """
    with explain_workers():
        yield from DataLoader(
            batches,
            batch_size=None,
            sampler=range(batches.num_before(first), len(batches)),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
