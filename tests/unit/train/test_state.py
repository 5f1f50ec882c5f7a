"""States on disk: whole ones are found, damaged ones are named and passed over, nothing is executed."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.damage import Trap
from train.state import INDEX, PARTS, StateFolder
from vzip import UserError
from vzip.files import sha256_of

SHAPES = {"linear.weight": (3, 2), "linear.bias": (3,)}


def tensors_of(part, step):
    """Tensors of a part, different for each step."""
    shapes = {name: () if part == "step" else shape for name, shape in SHAPES.items()}
    return {name: torch.full(shape, float(step)) for name, shape in shapes.items()}


def save_state(states, step):
    states.begin(step)
    states.finish(step, {part: states.write(step, part, tensors_of(part, step)) for part in PARTS})


@pytest.fixture
def states(tmp_path):
    """The states after 5 and 10 steps."""
    states = StateFolder(tmp_path / "state")
    for step in (5, 10):
        save_state(states, step)
    return states


def test_a_state_is_plain_tensors_with_their_checksums(states):
    assert states.newest(SHAPES) == 10
    names = {path.name for path in states.of(10).iterdir()}
    assert names == {INDEX, *(f"{part}.safetensors" for part in PARTS)}
    for part in PARTS:
        expected = tensors_of(part, 10)
        assert all(torch.equal(value, expected[name]) for name, value in states.read(10, part).items())


def test_two_states_are_kept_and_nothing_else(states):
    # A folder of a save that was interrupted, and a later one that was passed over as damaged.
    states.begin(7)
    save_state(states, 20)
    (states.of(20) / INDEX).write_text("{")
    save_state(states, 15)
    assert states.steps() == [15, 10]
    assert states.newest(SHAPES) == 15


def test_without_a_finished_state_training_starts_at_the_first_step(tmp_path, capsys):
    states = StateFolder(tmp_path / "state")
    assert states.newest(SHAPES) == 0
    assert capsys.readouterr().out == ""
    states.begin(5)
    states.write(5, "weights", tensors_of("weights", 5))
    assert states.newest(SHAPES) == 0
    assert "step5 was not finished (it has no state.json): training starts at" in capsys.readouterr().out


def flipped(file):
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def with_other_sizes(file):
    """Write whole tensors of another model, and their checksum."""
    save_file({name: value.new_zeros(9) for name, value in load_file(file).items()}, file)
    index = file.with_name(INDEX)
    content = json.loads(index.read_text())
    content["sha256"][file.stem] = sha256_of(file)
    index.write_text(json.dumps(content))


def as_pipe(file):
    """A reader of a pipe would wait for ever."""
    file.unlink()
    os.mkfifo(file)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "one bit": flipped,
    "text": lambda file: file.write_text("this is no state"),
    "NULs": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": as_pipe,
    "another model's": with_other_sizes,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["weights", "step"])
def test_a_damaged_part_falls_back_to_the_state_before(states, capsys, damage, part):
    file = states.of(10) / f"{part}.safetensors"
    DAMAGE[damage](file)
    assert states.newest(SHAPES) == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{file} ") and line.endswith(f"resuming from {states.of(5)}")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b"null", b"\0" * 9, b"[" * 100_000, b'{"step": 10, "format": 1}'],
)
def test_a_damaged_index_falls_back_too(states, capsys, content):
    index = states.of(10) / INDEX
    index.write_bytes(content)
    assert states.newest(SHAPES) == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{index} is damaged") and line.endswith(f"resuming from {states.of(5)}")


def test_every_byte_of_the_index_counts(states):
    """A changed digit leads to the state before, or to the same tensors: never to others."""
    index = states.of(10) / INDEX
    content = index.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        index.write_bytes(changed)
        assert states.newest(SHAPES) in (5, 10)


def test_without_a_whole_state_the_message_says_what_to_do(states):
    for step in (5, 10):
        flipped(states.of(step) / "exp_avg.safetensors")
    words = r"no state .*step10/exp_avg.*; .*step5/exp_avg.*restore.*delete this"
    with pytest.raises(UserError, match=words):
        states.newest(SHAPES)

    shutil.rmtree(states.path)
    states.path.write_text("")
    with pytest.raises(UserError, match="state is no folder"):
        states.newest(SHAPES)


def test_nothing_is_unpickled(states, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for file in states.of(10).glob("*.safetensors"):
        file.write_bytes(trap)
    (states.of(10) / "mp_rank_00_model_states.pt").write_bytes(trap)
    (states.path / "latest").write_text("step10")
    assert states.newest(SHAPES) == 5 and not (tmp_path / "sprung").exists()
