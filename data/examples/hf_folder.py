"""Folders of Hugging Face `datasets` with the pictures inside, as data in LLaVA's form.

`save_to_disk` writes such a folder, and `load_dataset` reads others (parquet, Arrow, JSON). The
columns are `conversations` as in LLaVA's JSON, `image` or `images` with pictures, and optionally
`id`, `source` and `type`.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data.fetch.http import NotFoundError
from data.paths import data_dir
from vzip.errors import UserError, check_package

PICTURE_COLUMNS = ("image", "images")
"""Columns that hold one picture, or a list of pictures."""
OTHER_COLUMNS = ("id", "source", "type", "conversations")
"""The other columns that are read."""
SAVED = ("state.json", "dataset_dict.json")
"""`save_to_disk` writes one of these files: the first for one split, the second for several."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a data set in a form that `datasets` reads."""
    if not path.is_dir():
        return False
    if any((path / name).is_file() for name in SAVED):
        return True

    # The first file of each form is enough: a folder may hold thousands.
    return any(next(path.rglob(f"*.{suffix}"), None) for suffix in ("parquet", "arrow", "jsonl"))


def _stored_pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pictures in a row of the dataset, each as {"bytes"} or {"path"}."""
    pictures = []
    for name in PICTURE_COLUMNS:
        # A picture, a list of pictures, or nothing: all become a list.
        stored = row.get(name) or []
        if not isinstance(stored, list):
            stored = [stored]

        # A column of strings holds paths.
        for picture in stored:
            pictures.append({"path": picture} if isinstance(picture, str) else picture)
    return pictures


class HfFolder:
    """The data set in a folder. If it has several splits, the one called "train".

    It is also the source of its pictures, see `Source`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the examples in LLaVA's form.

        The path of a picture says where it is in the folder (row, and number in the row), and ends
        in a hash of its bytes. Raises UserError as `dataset` does.
        """
        for position in range(len(self.dataset)):
            row = self._row(position)
            entry = {"id": str(position)}
            for name in OTHER_COLUMNS:
                if row.get(name) is not None:
                    entry[name] = row[name]

            # The hash keeps pictures of another folder with the same name apart.
            paths = []
            for number, picture in enumerate(_stored_pictures(row)):
                paths.append(f"{self.path.name}/{position:07}-{number}-{self._digest(picture)}")
            if paths:
                entry["image"] = paths
            yield entry

    def read(self, path: str) -> bytes:
        """Return the bytes of the picture with a path that `entries` made."""
        # The name is ROW-NUMBER-HASH, see `entries`.
        position, number, _ = Path(path).name.split("-")
        pictures = _stored_pictures(self._row(int(position)))
        return self._bytes(pictures[int(number)])

    @cached_property
    def dataset(self) -> Any:
        """A `datasets.Dataset`, as Arrow.

        Raises UserError if `datasets` can't read the folder, or a column is missing.
        """
        # The import takes seconds, which only such folders cost.
        check_package("datasets", extra="datasets", purpose=f"reading {self.path}")
        import datasets

        # Each form has its own loader. The second one converts the files, into our own folder.
        try:
            if any((self.path / name).is_file() for name in SAVED):
                dataset = datasets.load_from_disk(str(self.path))
            else:
                cache = str(data_dir() / "datasets")
                dataset = datasets.load_dataset(str(self.path), cache_dir=cache)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.path={self.path}: `datasets` can't read this folder: {error}") from error

        # Several splits come as a dict.
        if isinstance(dataset, dict):
            if "train" not in dataset:
                splits = ", ".join(dataset)
                raise UserError(
                    f"data.path={self.path} has the splits {splits}, but no 'train'; give one split"
                )
            dataset = dataset["train"]

        # The other columns may be missing, but without this one there is nothing to learn.
        if "conversations" not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise UserError(f"data.path={self.path} has no column 'conversations', only {columns}")

        # In Arrow form, pictures come as they are stored. Otherwise `datasets` would decode them.
        names = [name for name in PICTURE_COLUMNS + OTHER_COLUMNS if name in dataset.column_names]
        return dataset.select_columns(names).with_format("arrow")

    def _row(self, position: int) -> dict[str, Any]:
        # In Arrow form, a slice of the dataset is a table, here of one row.
        row: dict[str, Any] = self.dataset[position : position + 1].to_pylist()[0]
        return row

    def _digest(self, picture: dict[str, Any]) -> str:
        try:
            return hashlib.sha256(self._bytes(picture)).hexdigest()[:12]
        except NotFoundError:
            # The example is still listed: `read` fails later, and its reason is shown to the user.
            return "gone"

    def _bytes(self, picture: dict[str, Any]) -> bytes:
        if picture.get("bytes") is not None:
            return bytes(picture["bytes"])

        try:
            return (self.path / (picture.get("path") or "")).read_bytes()
        except OSError as error:
            raise NotFoundError(
                f"{self.path}: a picture is not inside, and can't be read: {error}"
            ) from error
