"""The resumable states of a run: plain tensors and their checksums, each state in a folder of its own.

    state/step25/weights.safetensors                             the trainable parameters
                 exp_avg, exp_avg_sq, step (all .safetensors)    what AdamW keeps for each of them
                 state.json                                      the sha256 of these files

Tensors are whole, so a state depends neither on the number of ranks nor on the ZeRO stage. Nothing is
unpickled. A folder becomes a state when state.json is written, last of all: without it, the process
was stopped while it saved. Rank 0 reads and writes.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vzip import UserError
from vzip.checkpoints.shards import check_all_finite
from vzip.files import atomic_write, read_json_object, sha256_of, sync, write_json

PARTS = ("weights", "exp_avg", "exp_avg_sq", "step")
"""What a state holds of each trainable parameter."""

INDEX = "state.json"
FORMAT = 1

NUM_KEPT = 2
"""States that are kept: the newest, and the one before it in case the newest is damaged."""


class StateFolder:
    """The states of one run.

    Args:
        path: where they lie.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, step: int) -> Path:
        """Return the folder of the state after a number of steps."""
        return self.path / f"step{step}"

    def steps(self) -> list[int]:
        """List the steps that have a folder, the newest first."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is no folder; move it away, then run the same command again")

        steps = []
        for folder in self.path.glob("step*"):
            number = folder.name.removeprefix("step")
            if number.isdecimal() and folder == self.of(int(number)):
                steps.append(int(number))
        return sorted(steps, reverse=True)

    def num_bytes(self) -> int:
        """Count the bytes of all states."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    # Writing

    def begin(self, step: int) -> None:
        """Make the empty folder of a new state."""
        # A folder of this name was not finished, or it is damaged.
        self._delete(step)
        self.of(step).mkdir(parents=True)
        sync(self.path)

    def write(self, step: int, part: str, tensors: Mapping[str, Tensor]) -> str:
        """Write a part of a state. Return its sha256.

        Raises:
            UserError: a value is not finite.
        """
        source = f"the state after step {step} ({part})"
        check_all_finite(tensors, source=source, advice="lower optim.lr; the states before it are whole")

        # The checksum is that of the bytes in memory, so it also finds what goes wrong on their way
        # to the disk.
        content = save(dict(tensors))
        with atomic_write(self._file(step, part)) as scratch:
            scratch.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def finish(self, step: int, checksums: Mapping[str, str]) -> None:
        """Make a state whole, and delete those that are not needed any more.

        Args:
            step: number of steps that are done.
            checksums: the sha256 of each part.
        """
        write_json(self.of(step) / INDEX, {"format": FORMAT, "step": step, "sha256": dict(checksums)})

        # The state before it stays. A state with more steps goes: the run passed it over as damaged.
        older = [each for each in self.steps() if each < step and self._is_finished(each)]
        kept = [step, *older[: NUM_KEPT - 1]]
        for each in self.steps():
            if each not in kept:
                self._delete(each)

    def _delete(self, step: int) -> None:
        """Delete the folder of a state, if there is one."""
        # The index goes first: without it, a half-deleted folder does not count as a state.
        folder = self.of(step)
        if folder.is_dir():
            (folder / INDEX).unlink(missing_ok=True)
            shutil.rmtree(folder)

    # Reading

    def newest(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Find the newest whole state. Return its step, or 0 if no state was ever finished.

        A printed line names each state that was passed over.

        Args:
            shapes: of the trainable parameters, by name.

        Raises:
            UserError: there are states, and none of them is whole.
        """
        faults = []
        for step in self.steps():
            fault = self._fault(step, shapes)
            if fault is None:
                for passed_over in faults:
                    print(f"{passed_over}: resuming from {self.of(step)}", flush=True)
                return step
            faults.append(fault)

        if any(self._is_finished(step) for step in self.steps()):
            raise UserError(
                f"no state in {self.path} is whole ({'; '.join(faults)}); restore these files, or delete "
                f"this folder: the same command then trains again from the first step, and keeps the "
                f"answers that are already there"
            )

        # The run was stopped while it saved its first state.
        for passed_over in faults:
            print(f"{passed_over}: training starts at the first step", flush=True)
        return 0

    def read(self, step: int, part: str) -> dict[str, Tensor]:
        """Read a part of a whole state."""
        return load_file(self._file(step, part))

    def _fault(self, step: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Say what is wrong with a state; None if it is whole."""
        folder = self.of(step)
        if not self._is_finished(step):
            return f"{folder} was not finished (it has no {INDEX})"
        try:
            index = read_json_object(folder / INDEX, advice=f"so {folder.name} can't be used")
        except UserError as error:
            return str(error)

        checksums = index.get("sha256")
        if index.get("format") != FORMAT or index.get("step") != step or not isinstance(checksums, dict):
            return f"{folder / INDEX} is damaged (it does not describe this state)"

        for part in PARTS:
            file = self._file(step, part)
            fault = _part_fault(file, checksums.get(part), _part_shapes(part, shapes))
            if fault is not None:
                return f"{file} {fault}"
        return None

    def _file(self, step: int, part: str) -> Path:
        return self.of(step) / f"{part}.safetensors"

    def _is_finished(self, step: int) -> bool:
        return (self.of(step) / INDEX).is_file()


def _part_shapes(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a part's tensors. AdamW counts the steps of each parameter in a scalar."""
    return {name: () if part == "step" else shape for name, shape in shapes.items()}


def _part_fault(file: Path, checksum: object, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Say what is wrong with a file of a state; None if it is as it was written."""
    # Reading a pipe or a device could last for ever.
    if not file.is_file():
        return "is missing"
    try:
        if sha256_of(file) != checksum:
            return f"is damaged (its sha256 is not the one in {INDEX})"
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        return f"can't be read ({error})"

    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        return "belongs to another model (its tensors have other names or shapes)"
    return None
