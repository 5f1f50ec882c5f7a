"""Instruction data of any form as an Arrow table on disk, made once and memory-mapped from then on.

A file is read example by example, so a gigabyte of JSON takes little memory. Examples are parsed,
checked and hashed only when the table is made. All ranks and later commands open it.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from data.conversations import BadExample, Conversation, parse_conversation, short_name
from data.examples.arrow import read_arrow, write_arrow
from data.examples.hf_folder import HfFolder, is_hf_folder
from data.examples.json_stream import MAX_ENTRY, read_list
from data.locks import locked
from data.paths import data_dir
from data.progress import progress
from vzip import UserError
from vzip.files import atomic_write

VERSION = 5
"""Version of the table.

Raise it when this file or `parse_conversation` changes what it makes of the same data.
"""
MAX_STEM = 100
"""A table's name starts with so many characters of the data's name. File systems limit names."""
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What the error handler "surrogateescape" makes of bytes that are not UTF-8."""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        # Why an example can't be used, or null. With a fault, the following columns are empty.
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
        columns: the columns of `SCHEMA`.
        sha256: hash of the content of all examples.
    """

    columns: pa.Table
    sha256: str

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def column(self, name: str) -> list[Any]:
        """Return a column of all examples."""
        values: list[Any] = self.columns[name].to_pylist()
        return values

    def conversation(self, position: int) -> Conversation:
        """Return the example at a position. It must have no fault."""

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
        """Return the examples that can't be used."""
        # Filter in Arrow: turning every example into Python objects would take seconds.
        has_fault = self.columns["fault"].is_valid()
        bad = self.columns.filter(has_fault).select(["id", "source", "fault"])
        return [BadExample(entry["id"], entry["source"], entry["fault"]) for entry in bad.to_pylist()]


def _read_lines(file: TextIO, path: Path) -> Iterator[Any]:
    """Yield the entries of a file of JSON lines, and a ValueError for each line that is broken.

    Raises UserError for a line without end.
    """
    # A file of another format may be a single line of gigabytes, so each line is read in part.
    lines = iter(partial(file.readline, MAX_ENTRY), "")
    for number, line in enumerate(lines, start=1):
        if len(line) == MAX_ENTRY:
            raise UserError(
                f"{path}, line {number}: it has more than {MAX_ENTRY:,} characters; "
                f"write each example on a line of its own"
            )
        if not line.strip():
            continue

        # Broken lines are yielded, not raised, so that each costs one example and not the file.
        if NOT_UTF8.search(line):
            yield ValueError(f"line {number} is not UTF-8 text; convert the file to UTF-8")
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"line {number} is not valid JSON: {error}")


def _read_entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list or of JSON lines, see `_read_lines`."""
    with path.open("rb") as raw:
        # A list starts with a bracket, and JSON lines with the first example's brace.
        first = raw.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        raw.seek(0)
        if first not in (b"[", b"{"):
            start = first.decode(errors="replace") or "nothing"
            raise UserError(
                f"{path}: expected a JSON list of examples in UTF-8, or one example a line; "
                f"it starts with {start!r}"
            )

        # Bytes that are not UTF-8 cost one line of JSON lines, so they must come through until that
        # line is known. In a list they could hide where an entry ends, so there they are an error.
        is_lines = first == b"{"
        errors = "surrogateescape" if is_lines else "strict"
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors=errors)
        entries = _read_lines(file, path) if is_lines else read_list(file, path)
        with progress(None, total=path.stat().st_size, title=f"read {path.name}", unit="B") as bar:
            for entry in entries:
                # The reader is ahead of the entries by what is in memory, so the bar is too.
                bar.update(raw.tell() - bar.n)
                yield entry


def _record(position: int, entry: Any) -> dict[str, Any]:
    """Return an example as a record of `SCHEMA`."""
    # A bad example gets a record too: positions stay those of the file, and the fault is shown.
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
    """Return an example that can't be used as a record of `SCHEMA`."""
    # Name the example by its id, or else by its position.
    name = f"#{position}"
    if isinstance(entry, dict):
        name = short_name(entry.get("id", name))

    # JSON can hold half of a surrogate pair, but Arrow refuses it as text: "?" takes its place.
    # The source is not known, because the paths that name it may be wrong too.
    return {
        "id": name.encode(errors="replace").decode(),
        "source": "invalid",
        "fault": reason.encode(errors="replace").decode(),
        "digest": "",
        "has_media": False,
    }


def _write_table(path: Path, target: Path) -> None:
    """Make the table of the data at `path`, and beside it the file with the hash of its content."""
    # The hash is computed while the records are written, so the data is read only once.
    digest = hashlib.sha256()

    def records() -> Iterator[dict[str, Any]]:
        entries = HfFolder(path).entries() if path.is_dir() else _read_entries(path)
        for position, entry in enumerate(entries):
            record = _record(position, entry)
            digest.update((record["digest"] or record["fault"]).encode())
            yield record

    # Delete the tables of earlier versions of the same data.
    name, _, _ = target.stem.rpartition("-")
    for old in target.parent.glob(f"{escape(name)}-*"):
        if not old.name.startswith(target.stem):
            old.unlink(missing_ok=True)

    write_arrow(records(), SCHEMA, target)

    # This file comes last: it shows that the table is whole.
    with atomic_write(target.with_suffix(".sha256")) as scratch:
        scratch.write_text(digest.hexdigest())


def _state(path: Path) -> list[Any]:
    """Return names, sizes and times, which change when the file or the folder's files do."""
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


def _read_hash(path: Path) -> str:
    """Read the hash of a table's content. Raises UserError if the file is damaged."""
    content = path.read_text(encoding="ascii", errors="replace")
    if not re.fullmatch("[0-9a-f]{64}", content):
        raise UserError(f"{path} is damaged; delete it, and run the same command again, which makes it")
    return content


def _check_is_data(path: Path) -> None:
    """Raise UserError unless there is a file, or a folder of Hugging Face `datasets`."""
    if path.is_file() or is_hf_folder(path):
        return

    # Reading a pipe would wait for ever.
    problem = "is neither a file nor a folder of `datasets`" if path.exists() else "does not exist"
    raise UserError(
        f"data file {path} {problem}; set data.path (or data.held_out) to a LLaVA-format JSON or "
        f"JSONL file, or to a folder of Hugging Face datasets, or run `make data` if data.address "
        f"names the file"
    )


def open_table(path: str | Path) -> Table:
    """Open the table of a data file or folder. Make it if it is missing, or if the data changed.

    Args:
        path: a JSON list, a file of JSON lines, or a folder of Hugging Face `datasets`.

    Raises:
        UserError: the data is missing or unreadable. Examples that can't be used are no error, see
            `Table.bad_examples`.
    """
    path = Path(path).absolute()
    _check_is_data(path)

    # The first hash stays when the data changes, so the old table can be found and deleted.
    folder = data_dir() / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{path.stem[:MAX_STEM]}-{_short_hash(str(path))}"
    target = folder / f"{name}-{_short_hash(VERSION, _state(path))}.arrow"

    # The file with the hash is written last. Without it, the table may be cut short.
    hash_file = target.with_suffix(".sha256")
    if not (hash_file.is_file() and target.is_file()):
        with locked(folder / f"{name}.lock", wait=True):
            # Another process may have written it in the meantime.
            if not (hash_file.is_file() and target.is_file()):
                _write_table(path, target)
    return Table(read_arrow(target), sha256=_read_hash(hash_file))
