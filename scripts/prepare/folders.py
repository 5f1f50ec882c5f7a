"""Folders that are made once, whole or not at all, also by several processes at once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.locks import locked
from vzip.errors import UserError
from vzip.files import read_json, write_json

STAMP = "prepared.json"
"""File that says what a folder was made from. It is written last."""


def is_prepared(folder: Path, made_from: Any) -> bool:
    """Tell whether a folder was made from this. A damaged stamp means that it was not."""
    if not (folder / STAMP).is_file():
        return False
    try:
        return bool(read_json(folder / STAMP, advice="") == made_from)
    except UserError:
        return False


@contextmanager
def prepared_once(target: Path, made_from: Any) -> Iterator[Path | None]:
    """Yield an empty folder to fill, which takes the place of `target` at the end of the block.

    It yields None if another process has made the folder in the meantime. Other processes may read
    the old folder until then.

    Args:
        target: the folder.
        made_from: what it is made from, as JSON holds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock"), wait=True):
        if is_prepared(target, made_from):
            yield None
            return

        # Under the lock, whatever lies here was left by a killed process.
        new = target.with_name(f".{target.name}.new")
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            write_json(new / STAMP, made_from)

            # With two renames, the folder is missing only for a moment.
            if target.exists():
                target.rename(old)
            new.rename(target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
