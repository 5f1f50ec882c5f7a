"""Arrow files: written in batches, and memory-mapped."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from vzip import UserError
from vzip.files import atomic_write

BATCH = 1000
"""Records that are in memory at once while a file is written."""


def write_arrow(records: Iterable[dict[str, Any]], schema: pa.Schema, target: Path) -> None:
    """Write the records, whole or not at all."""
    # Batches, because the records of a whole data set would take gigabytes as Python objects.
    batch: list[dict[str, Any]] = []
    with (
        atomic_write(target) as scratch,
        pa.OSFile(str(scratch), "wb") as file,
        ipc.new_file(file, schema) as writer,
    ):
        for record in records:
            batch.append(record)
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch.clear()

        # The records behind the last full batch.
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))


def read_arrow(path: Path) -> pa.Table:
    """Open a file, memory-mapped, and check all of it. Raises UserError if it is damaged."""
    try:
        table = ipc.open_file(pa.memory_map(str(path))).read_all()
        # Arrow trusts what it maps: a damaged offset would crash this process later.
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and run the same command again, which makes it"
        ) from error
