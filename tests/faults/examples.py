"""Rows and pictures with mistakes, drawn as the property tests draw them."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import Phase, given
from PIL import Image

from data.examples.prepare import Selection, prepare
from tests.faults.world import World
from tests.helpers import tiny
from tests.helpers.broken import JSON, messages, mutated, pictures
from vzip import UserError
from vzip.templates.encode import IGNORED, vicuna

BOMBS = [(1, 60_000), (60_000, 1), (14_000, 14_000)]
"""(width, height) of pictures that are small files, but take gigabytes in a processor."""

NUM_GOOD = 120
"""Good rows around the bad one: one per cent may be bad."""


@cache
def _drawn(name: str, seed: int, count: int) -> list[Any]:
    """Draw rows or pictures. The same seed draws the same ones."""
    strategy = {"row": mutated() | JSON, "picture": pictures()}[name]
    values = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def draw(value):
        values.append(value)

    draw()
    return values


@cache
def _good(folder: Path) -> list[dict]:
    """Write the pictures of the good rows once."""
    rows = []
    for number in range(NUM_GOOD):
        row = {"id": f"row-{number}", "image": f"coco/{number}.png"}
        row["conversations"] = messages(f"<image>\nwhat {number}?", "a café, \U0001f600")
        path = folder / "images" / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.picture(number, 12, 20).save(path)
        rows.append(row)
    return rows


def examples(world: World, rng: random.Random, number: int) -> None:
    """Put a bad row, a bad picture or bad bytes among good rows."""
    kind = "bomb" if number % 50 == 49 else ("row", "picture", "bytes")[number % 3]
    folder = world.folder / "examples"
    rows = [*_good(folder)]
    path = folder / f"{number}.jsonl"
    where = rng.randrange(NUM_GOOD)
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]

    if kind == "row":
        drawn = _drawn("row", 1, 400)
        row = drawn[rng.randrange(len(drawn))]
        world.description = f"row {json.dumps(row)[:200]}"
        lines.insert(where, json.dumps(row).encode())
    elif kind == "picture":
        drawn = _drawn("picture", 1, 400)
        content = drawn[rng.randrange(len(drawn))]
        row = {**rows[where], "id": "bad", "image": f"coco/bad-{number}.png"}
        (folder / "images" / row["image"]).write_bytes(content)
        world.description = f"picture of {len(content)} bytes: {content[:30]!r}"
        lines.insert(where, json.dumps(row).encode())
    elif kind == "bomb":
        size = BOMBS[number // 50 % len(BOMBS)]
        row = {**rows[where], "id": "bad", "image": f"coco/bomb-{number}.png"}
        Image.new("L", size).save(folder / "images" / row["image"])
        world.description = f"picture of {size[0]} x {size[1]} pixels"
        lines.insert(where, json.dumps(row).encode())
    else:
        line = bytearray(lines[where])
        for _ in range(rng.randint(1, 3)):
            line[rng.randrange(len(line))] = rng.randrange(1, 256)
        world.description = f"line {bytes(line)[:200]!r}"
        lines[where] = bytes(line).replace(b"\n", b" ")

    # A changed line may be lost itself.
    path.write_bytes(b"\n".join(lines) + b"\n")
    good = {row["id"] for row in rows}
    if kind == "bytes":
        good.remove(rows[where]["id"])
    listed = _check(path, folder, good, len(lines))
    assert kind != "bomb" or "bad" in listed, "the picture is used"


def _check(path: Path, folder: Path, good: set[str], num_rows: int) -> set[str]:
    """Check that the good rows are used, the bad one is used or listed, and labels are whole.

    Returns:
        the ids of the rows that are listed
    """
    selection = Selection(path=str(path), image_folder=str(folder / "images"))
    try:
        subset = prepare(selection)
    except UserError as error:
        assert str(error).count("\n") < 12, f"a message of many lines: {str(error)[:200]}"
        return set()

    manifest = subset.manifest
    lost = good - set(manifest["ids"])
    assert not lost, f"good rows are lost: {sorted(lost)[:3]}"
    assert manifest["num_rows"] + len(manifest["bad_rows"]) == num_rows, "a row is neither used nor listed"
    assert all(row["reason"] for row in manifest["bad_rows"]), "a row without a reason"

    tokenizer = tiny.tokenizer()
    for example in subset.examples(vicuna(), tokenizer, max_tokens=100_000):
        answer = tokenizer.decode([label for label in example.labels if label != IGNORED])
        assert "\ufffd" not in answer, f"a label with a replacement character: {answer[:100]!r}"
    return {row["id"] for row in manifest["bad_rows"]}
