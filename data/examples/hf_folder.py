"""Folders of Hugging Face `datasets` with the pictures inside, as data in LLaVA's form.

`save_to_disk` writes such a folder, and `load_dataset` reads others (parquet, Arrow, JSON). The
columns are `conversations` as in LLaVA's JSON, `image` or `images` with pictures, and optionally
`id`, `source` and `type`.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from data.fetch.http import NotFoundError
from data.paths import data_dir
from vzip.errors import UserError, check_package
from vzip.files import check_is_file, read_json_object
from vzip.pictures import MAX_BYTES

PICTURE_COLUMNS = ("image", "images")
"""Columns that hold one picture, or a list of pictures."""
OTHER_COLUMNS = ("id", "source", "type", "conversations")
"""The other columns that are read."""
SAVED = ("state.json", "dataset_dict.json")
"""`save_to_disk` writes one of these files: the first for one split, the second for several."""
CARDS = ("README.md", ".huggingface.yaml")
"""Files that may tell `load_dataset` where the data is."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a data set in a form that `datasets` reads."""
    if not path.is_dir():
        return False
    if any((path / name).is_file() for name in SAVED):
        return True

    # Stop at the first file of each form: a folder may hold thousands.
    return any(next(path.rglob(f"*.{suffix}"), None) for suffix in ("parquet", "arrow", "jsonl"))


def _stored_pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pictures in a row of the dataset, each as {"bytes"} or {"path"}."""
    pictures = []
    for name in PICTURE_COLUMNS:
        # A picture, a list of pictures, or nothing: all become a list.
        stored = row.get(name) or []
        if not isinstance(stored, list):
            stored = [stored]

        # A column of strings holds paths, and one of bytes holds files.
        for picture in stored:
            if isinstance(picture, str):
                picture = {"path": picture}
            elif isinstance(picture, bytes):
                picture = {"bytes": picture}
            pictures.append(picture if isinstance(picture, dict) else {})
    return pictures


def _file_inside(folder: Path, name: str) -> Path:
    """Return a file by its path relative to a folder.

    Raises ValueError if it leaves the folder or is no file, and OSError if it is missing.
    """
    # Whoever made the folder must not choose which other files are read here.
    file = (folder / name).resolve()
    allowed = [folder.resolve()]

    # In the hub's cache, a file is a link into this folder beside it.
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(file.is_relative_to(root) for root in allowed):
        raise ValueError(f"{name[:100]} leaves the folder")

    check_is_file(file)
    return file


def _named_in_card(card: Path) -> Iterator[str]:
    """Yield the data files and folders that a card names. Raises YAMLError if it is damaged."""
    # A README has them between two lines of dashes, in front of its text.
    text = card.read_text(encoding="utf-8")
    if card.suffix == ".md":
        front = re.match(r"\s*---\s*\n(.*?)\n---", text, flags=re.DOTALL)
        text = front[1] if front else ""

    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        return

    # Names lie in lists and groups of any depth.
    pending = [content.get("configs")]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _check_inside(folder: Path) -> None:
    """Raise ValueError if a folder's own description names data outside of it."""
    for card in CARDS:
        if (folder / card).is_file():
            for name in _named_in_card(folder / card):
                if "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"{card} names {name[:100]}, which leaves the folder")

    # A saved data set lists its splits, and each split its files.
    advice = "save the data set again"
    splits = [folder]
    if (folder / SAVED[1]).is_file():
        names = read_json_object(folder / SAVED[1], advice=advice).get("splits", [])
        splits = [_file_inside(folder, f"{name}/{SAVED[0]}").parent for name in names]
    for split in splits:
        if (split / SAVED[0]).is_file():
            for file in read_json_object(split / SAVED[0], advice=advice)["_data_files"]:
                _file_inside(split, file["filename"])


class HfFolder:
    """The data set in a folder. If it has several splits, the one called "train".

    It is also the source of its pictures, see `Source`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def entries(self) -> Iterator[Any]:
        """Yield the examples in LLaVA's form, and a ValueError for each row that can't be read.

        The path of a picture says where it is in the folder (row, and number in the row), and ends
        in a hash of its bytes. Raises UserError as `dataset` does.
        """
        for position in range(len(self.dataset)):
            try:
                row = self._row(position)
            except ValueError as error:
                # Arrow does not check that its texts are UTF-8.
                yield ValueError(f"row {position} can't be read: {error}")
                continue
            entry: dict[str, Any] = {"id": str(position)}
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
        # The import takes seconds, so commands that need no such folder skip it.
        check_package("datasets", extra="datasets", purpose=f"reading {self.path}")
        import datasets

        # Each form has its own loader. The second one converts the files, into our own folder.
        try:
            _check_inside(self.path)
            if any((self.path / name).is_file() for name in SAVED):
                dataset = datasets.load_from_disk(str(self.path))
            else:
                cache = str(data_dir() / "datasets")
                builder = datasets.load_dataset_builder(str(self.path), cache_dir=cache)
                self._check_data_files(builder.config.data_files or {})
                builder.download_and_prepare()
                dataset = builder.as_dataset()
        except UserError:
            raise
        except Exception as error:
            # Its files may hold anything, and `datasets` has no error of its own for that. A folder
            # with a script ends here too, because `datasets` never runs scripts.
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

    def _check_data_files(self, data_files: Mapping[str, Sequence[str]]) -> None:
        """Raise ValueError if `datasets` has chosen data outside of the folder, whatever made it."""
        # Links are the user's own, and may lead to another disk. `datasets` follows those in the path
        # of the folder itself.
        roots = (self.path.absolute(), self.path.resolve())
        for files in data_files.values():
            for file in files:
                path = Path(os.path.normpath(file))
                if not any(path.is_relative_to(root) for root in roots):
                    raise ValueError(f"{file} leaves the folder")

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
            file = _file_inside(self.path, str(picture.get("path") or ""))
            num_bytes = file.stat().st_size
            if num_bytes > MAX_BYTES:
                raise ValueError(f"a file of {num_bytes:,} bytes; at most {MAX_BYTES:,} are allowed")
            return file.read_bytes()
        except (OSError, ValueError) as error:
            raise NotFoundError(
                f"{self.path}: a picture is not inside, and can't be read: {error}"
            ) from error
