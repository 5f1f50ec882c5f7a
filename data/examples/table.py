"""Instruction data of any form as an Arrow table on disk, made once and memory-mapped from then on.

A file is read row by row, so memory stays small for a gigabyte of JSON, and no rank or later command parses it again.
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

from data.conversations import BadExample, Conversation, canonical, parse_conversation
from data.examples.arrow import read_arrow, write_arrow
from data.examples.hf_folder import HfFolder, is_hf_folder
from data.examples.json_stream import read_list
from data.paths import atomic_write, data_dir
from data.progress import progress
from vzip import UserError

VERSION = 2
"""Of what is written: raise it when this file, or `parse_conversation`, makes something else of the same data."""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "digest": pa.string(),  # sha256 of the content; of rows that can't be used "", as the following
        "has_media": pa.bool_(),
        "row": pa.string(),  # JSON
        "fault": pa.string(),  # why a row can't be used, or null
    }
)


@dataclass(frozen=True)
class Table:
    """The rows of one data file or folder, by their position in it."""

    columns: pa.Table
    sha256: str
    """Of the content of all rows."""

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def column(self, name: str) -> list[Any]:
        """A column of all rows."""
        values: list[Any] = self.columns[name].to_pylist()
        return values

    def row(self, position: int) -> Conversation:
        """A row without a fault."""
        return parse_conversation(json.loads(self.columns["row"][position].as_py()))

    def bad_examples(self) -> list[BadExample]:
        """The rows that can't be used."""
        bad = self.columns.filter(self.columns["fault"].is_valid()).select(["id", "source", "fault"])
        return [BadExample(row["id"], row["source"], row["fault"]) for row in bad.to_pylist()]


def _read_lines(file: TextIO) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:  # one lost line, not a lost file
                yield ValueError(f"line {number} is not valid JSON: {error}")


def _read_file(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, or of JSON lines; a ValueError in place of a line that can't be read."""
    with path.open("rb") as raw:
        first = raw.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        raw.seek(0)
        if first not in (b"[", b"{"):
            found = first.decode(errors="replace") or "nothing"
            raise UserError(
                f"{path}: expected a JSON list of rows in UTF-8, or a row a line, found {found!r}"
            )
        lines = first == b"{"
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace" if lines else "strict")
        with progress(None, total=path.stat().st_size, title=f"read {path.name}", unit="B") as bar:
            for entry in _read_lines(file) if lines else read_list(file, path):
                bar.update(raw.tell() - bar.n)
                yield entry


def _record(position: int, entry: Any) -> dict[str, Any]:
    try:
        if isinstance(entry, ValueError):
            raise entry
        row, content = parse_conversation(entry), canonical(entry).decode()
    except (ValueError, RecursionError) as error:
        name = str(entry.get("id", f"#{position}")) if isinstance(entry, dict) else f"#{position}"
        name = name.encode(errors="replace").decode()
        reason = str(error).encode(errors="replace").decode()
        return {"id": name, "source": "rows", "digest": "", "has_media": False, "row": "", "fault": reason}
    return {
        "id": row.id,
        "source": row.source,
        "digest": row.digest,
        "has_media": bool(row.images or row.videos),
        "row": content,
        "fault": None,
    }


def _write(path: Path, target: Path) -> None:
    """Make the table of the data at `path`, and the file beside it with the hash of its content."""
    digest = hashlib.sha256()

    def records() -> Iterator[dict[str, Any]]:
        for position, entry in enumerate(HfFolder(path).entries() if path.is_dir() else _read_file(path)):
            record = _record(position, entry)
            digest.update((record["digest"] or record["fault"]).encode())
            yield record

    for old in target.parent.glob(
        f"{escape(target.stem.rsplit('-', 1)[0])}-*"
    ):  # of the file as it was before
        if not old.name.startswith(target.stem):
            old.unlink(missing_ok=True)
    write_arrow(records(), SCHEMA, target)
    with atomic_write(target.with_suffix(".sha256")) as scratch:  # last: it says that the table is whole
        scratch.write_text(digest.hexdigest())


def _state(path: Path) -> list[Any]:
    """What changes when a file, or a file in a folder, does."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def open_table(path: str | Path) -> Table:
    """The table of a JSON or JSON-lines file, or of a folder of Hugging Face `datasets`; made where it is not there yet.

    Raises:
        UserError: nothing there, a file that is not JSON (with the place), or that holds no rows.
    """
    path = Path(path).absolute()
    if not path.is_file() and not is_hf_folder(path):
        raise UserError(
            f"data file {path} does not exist; set data.path (or data.held_out) to a LLaVA-format JSON or JSONL file, or to a "
            f"folder of Hugging Face datasets, or run `make data` where data.address says where the file is"
        )
    folder = data_dir() / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    where, state = (
        hashlib.sha256(json.dumps([VERSION, what]).encode()).hexdigest()[:12]
        for what in (str(path), _state(path))
    )
    target = folder / f"{path.stem}-{where}-{state}.arrow"
    whole = target.with_suffix(".sha256")
    if not (whole.is_file() and target.is_file()):
        _write(path, target)
    return Table(read_arrow(target), sha256=whole.read_text())
