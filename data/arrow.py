"""Arrow files: written in batches beside their place, and memory-mapped."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

BATCH = 1000
"""Rows that are in memory at once."""


def write_arrow(records: Iterable[dict[str, Any]], schema: pa.Schema, target: Path) -> None:
    """Write the records, so that a kill leaves no file or the whole one."""
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    batch: list[dict[str, Any]] = []
    try:
        with pa.OSFile(str(scratch), "wb") as file, ipc.new_file(file, schema) as writer:
            for record in records:
                batch.append(record)
                if len(batch) == BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                    batch.clear()
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def read_arrow(path: Path) -> pa.Table:
    """The table, memory-mapped."""
    return ipc.open_file(pa.memory_map(str(path))).read_all()
