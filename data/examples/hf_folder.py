"""Folders of Hugging Face `datasets` with the pictures inside: their rows in LLaVA's form, and their pictures.

A folder is what `save_to_disk` writes, or one that `load_dataset` reads (parquet, Arrow, JSON). Its columns: `conversations` as
in LLaVA's JSON, `image` or `images` with pictures, and, where there are, `id`, `source`, `type`.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data.fetch.http import NotFoundError
from data.paths import data_dir
from vzip import UserError

COLUMNS = ("image", "images")
"""That may hold pictures: one, or a list of them."""
KEPT = ("id", "source", "type", "conversations")
"""The other columns that are read."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a data set in a form that `datasets` reads."""
    return path.is_dir() and (
        (path / "state.json").is_file()
        or (path / "dataset_dict.json").is_file()
        or any(next(path.rglob(f"*.{suffix}"), None) for suffix in ("parquet", "arrow", "jsonl"))
    )


def _pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is stored of a row's pictures: "bytes", or a "path"."""
    values = [row.get(name) or [] for name in COLUMNS]
    pictures = [picture for value in values for picture in (value if isinstance(value, list) else [value])]
    return [{"path": picture} if isinstance(picture, str) else picture for picture in pictures]


class HfFolder:
    """The data set of a folder, its split "train" where it has several.

    Raises:
        UserError: a folder that `datasets` can't read, or without the columns above.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def rows(self) -> Any:
        """A `datasets.Dataset`, as Arrow."""
        import datasets  # seconds, which only such folders cost

        saved = any((self.path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        load = datasets.load_from_disk if saved else datasets.load_dataset
        try:
            found = load(str(self.path), **({} if saved else {"cache_dir": str(data_dir() / "datasets")}))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.path={self.path}: `datasets` can't read this folder: {error}") from error
        if isinstance(found, dict):
            if "train" not in found:
                raise UserError(
                    f"data.path={self.path} has the splits {', '.join(found)}, but no 'train'; give one split"
                )
            found = found["train"]
        if "conversations" not in found.column_names:
            raise UserError(
                f"data.path={self.path} has no column 'conversations', only {', '.join(found.column_names)}"
            )
        read = [name for name in (*COLUMNS, *KEPT) if name in found.column_names]
        return found.select_columns(read).with_format(
            "arrow"
        )  # pictures as they are stored; decoding is not asked for

    def _row(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[position : position + 1].to_pylist()[0]
        return row

    def entries(self) -> Iterator[dict[str, Any]]:
        """The rows in LLaVA's form: a picture's path has its place (row and number there) and a hash of what it shows."""
        for position in range(len(self.rows)):
            row = self._row(position)
            entry = {"id": str(position)} | {name: row[name] for name in KEPT if row.get(name) is not None}
            digests = [self._digest(picture) for picture in _pictures(row)]
            if digests:
                entry["image"] = [
                    f"{self.path.name}/{position:07}-{number}-{digest}"
                    for number, digest in enumerate(digests)
                ]
            yield entry

    def _digest(self, picture: dict[str, Any]) -> str:
        try:
            return hashlib.sha256(self._bytes(picture)).hexdigest()[:12]
        except NotFoundError:
            return "gone"

    def read(self, path: str) -> bytes:
        """The bytes of the picture with a path that `entries` gave."""
        position, number, _ = Path(path).name.split("-")
        return self._bytes(_pictures(self._row(int(position)))[int(number)])

    def _bytes(self, picture: dict[str, Any]) -> bytes:
        if picture.get("bytes") is not None:
            return bytes(picture["bytes"])
        try:
            return (self.path / (picture.get("path") or "")).read_bytes()
        except OSError as error:
            raise NotFoundError(
                f"{self.path}: a picture is not inside, and can't be read: {error}"
            ) from error
