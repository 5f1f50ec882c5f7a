"""Instruction data of any form as an Arrow table on disk, made once and memory-mapped from then on.

A file is read example by example, so a gigabyte of JSON takes little memory. Examples are parsed,
checked and hashed when the table is made; no rank and no later command does it again.
"""

import codecs
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from data.conversations import BadExample, Conversation, parse_conversation
from data.examples.arrow import read_arrow, write_arrow
from data.examples.hf_folder import HfFolder, is_hf_folder
from data.examples.json_stream import read_list
from data.paths import atomic_write, data_dir
from data.progress import progress
from vzip import UserError

VERSION = 3
"""Version of the table.

Raise it when this file, or `parse_conversation`, makes something else of the same data.
"""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        # Why an example can't be used, or null. Such an example has none of the following.
        "fault": pa.string(),
        "kind": pa.string(),
        "digest": pa.string(),
        "images": pa.list_(pa.string()),
        "videos": pa.list_(pa.string()),
        "questions": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),
        "has_media": pa.bool_(),
    }
)


@dataclass(frozen=True)
class Table:
    """The examples of one data file or folder, by their position in it.

    Attributes:
        columns: see `SCHEMA`.
        sha256: of the content of all examples.
    """

    columns: pa.Table
    sha256: str

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def column(self, name: str) -> list[Any]:
        """A column of all examples."""
        values: list[Any] = self.columns[name].to_pylist()
        return values

    def conversation(self, position: int) -> Conversation:
        """The example at a position, which must have no fault."""

        def value(name: str) -> Any:
            return self.columns[name][position].as_py()

        return Conversation(
            id=value("id"),
            images=tuple(value("images")),
            videos=tuple(value("videos")),
            turns=tuple(zip(value("questions"), value("answers"), strict=True)),
            source=value("source"),
            kind=value("kind"),
            digest=value("digest"),
        )

    def bad_examples(self) -> list[BadExample]:
        """The examples that can't be used."""
        has_fault = self.columns["fault"].is_valid()
        bad = self.columns.filter(has_fault).select(["id", "source", "fault"])
        return [BadExample(entry["id"], entry["source"], entry["fault"]) for entry in bad.to_pylist()]


def _read_lines(file: TextIO) -> Iterator[Any]:
    """The entries of a file of JSON lines; a ValueError in place of a line that can't be read."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            # One lost example, and not a lost file.
            yield ValueError(f"line {number} is not valid JSON: {error}")


def _read_entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list or of JSON lines, see `_read_lines`."""
    with path.open("rb") as raw:
        # A list starts with a bracket, and JSON lines with the first example's brace.
        first = raw.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        raw.seek(0)
        if first not in (b"[", b"{"):
            start = first.decode(errors="replace") or "nothing"
            raise UserError(
                f"{path}: expected a JSON list of examples in UTF-8, or one example a line; it starts with {start!r}"
            )

        # Odd bytes cost one line of JSON lines, but in a list they hide where an entry ends.
        is_lines = first == b"{"
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace" if is_lines else "strict")
        entries = _read_lines(file) if is_lines else read_list(file, path)
        with progress(None, total=path.stat().st_size, title=f"read {path.name}", unit="B") as bar:
            for entry in entries:
                # The position in the file runs ahead of the entries by the part that is in memory.
                bar.update(raw.tell() - bar.n)
                yield entry


def _record(position: int, entry: Any) -> dict[str, Any]:
    """An example as a record of `SCHEMA`."""
    try:
        if isinstance(entry, ValueError):
            raise entry
        example = parse_conversation(entry)
    except (ValueError, RecursionError) as error:
        return _bad_record(position, entry, str(error))

    return {
        "id": example.id,
        "source": example.source,
        "fault": None,
        "kind": example.kind,
        "digest": example.digest,
        "images": example.images,
        "videos": example.videos,
        "questions": [question for question, _ in example.turns],
        "answers": [answer for _, answer in example.turns],
        "has_media": bool(example.images or example.videos),
    }


def _bad_record(position: int, entry: Any, reason: str) -> dict[str, Any]:
    name = f"#{position}"
    if isinstance(entry, dict):
        name = str(entry.get("id", name))

    # Half of a surrogate pair, which JSON can hold, is no text for Arrow.
    return {
        "id": name.encode(errors="replace").decode(),
        "source": "rows",
        "fault": reason.encode(errors="replace").decode(),
        "digest": "",
        "has_media": False,
    }


def _write_table(path: Path, target: Path) -> None:
    """Make the table of the data at `path`, and beside it the file with the hash of its content."""
    digest = hashlib.sha256()

    def records() -> Iterator[dict[str, Any]]:
        entries = HfFolder(path).entries() if path.is_dir() else _read_entries(path)
        for position, entry in enumerate(entries):
            record = _record(position, entry)
            digest.update((record["digest"] or record["fault"]).encode())
            yield record

    # Tables of the same data as it was before.
    name, _, _ = target.stem.rpartition("-")
    for old in target.parent.glob(f"{escape(name)}-*"):
        if not old.name.startswith(target.stem):
            old.unlink(missing_ok=True)

    write_arrow(records(), SCHEMA, target)
    # This file comes last: it says that the table is whole.
    with atomic_write(target.with_suffix(".sha256")) as scratch:
        scratch.write_text(digest.hexdigest())


def _state(path: Path) -> list[Any]:
    """Something that changes when a file, or a file in a folder, does."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())

    state = []
    for file in files:
        stat = file.stat()
        state.append((str(file), stat.st_size, stat.st_mtime_ns))
    return state


def _short_hash(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def open_table(path: str | Path) -> Table:
    """Open the table of a data file or folder; make it if it is missing, or if the data changed.

    Args:
        path: a JSON list, a file of JSON lines, or a folder of Hugging Face `datasets`.

    Raises:
        UserError: the data is missing or unreadable. Examples that can't be used are no error, see
            `Table.bad_examples`.
    """
    path = Path(path).absolute()
    if not path.is_file() and not is_hf_folder(path):
        raise UserError(
            f"data file {path} does not exist; set data.path (or data.held_out) to a LLaVA-format JSON or JSONL file, or to a "
            f"folder of Hugging Face datasets, or run `make data` where data.address says where the file is"
        )

    # The first hash stays when the data changes, so that the old table can be found and deleted.
    folder = data_dir() / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    where = _short_hash(str(path))
    state = _short_hash(VERSION, _state(path))
    target = folder / f"{path.stem}-{where}-{state}.arrow"

    # The file with the hash comes last: without it, a kill may have cut the table short.
    hash_file = target.with_suffix(".sha256")
    if not (hash_file.is_file() and target.is_file()):
        _write_table(path, target)
    return Table(read_arrow(target), sha256=hash_file.read_text())
