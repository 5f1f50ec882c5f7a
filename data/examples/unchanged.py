"""Notice pictures and videos that have changed since their subset was prepared.

Otherwise a run would use them without a word, also when it resumes.
"""

import random
from multiprocessing.pool import ThreadPool
from pathlib import Path

from data.examples.bad_examples import first_lines
from data.examples.prepare import Subset
from data.fetch.media_index import MediaIndex
from vzip import UserError
from vzip.files import sha256_of

NUM_HASHED = 256
"""Pictures whose content a run compares when it starts. It compares the sizes of all, and of videos."""

NUM_THREADS = 16
"""Threads that wait for the disk."""


def change_of(path: str, folder: Path, index: MediaIndex, *, hashed: bool) -> str | None:
    """Say how a picture or video differs from the prepared one. None if it does not.

    Args:
        path: below the folder.
        folder: the folder of pictures and videos.
        index: what was recorded when the subset was made.
        hashed: whether to read a picture's content. Otherwise only its size is compared.

    Raises:
        OSError: the file can't be read.
    """
    entry = index.lookup(path, folder, ())
    if entry is None:
        return "it is missing, or has another size than when the data was prepared"

    # Only pictures have a digest: a video may have gigabytes.
    if hashed and entry.digest and not sha256_of(folder / path).startswith(entry.digest):
        return "it has another content than when the data was prepared"
    return None


def check_media_unchanged(subset: Subset, *, num_hashed: int = NUM_HASHED) -> None:
    """Raise UserError if pictures or videos of a subset are not those that it was prepared with.

    It compares the sizes of all, and the content of a sample of pictures, the same in every process.
    """
    paths = sorted(subset.media_paths())
    sample = set(random.Random(0).sample(paths, min(num_hashed, len(paths))))
    index = subset.media_index

    def check(path: str) -> str | None:
        try:
            return change_of(path, subset.image_folder, index, hashed=path in sample)
        except OSError as error:
            return str(error)

    with ThreadPool(NUM_THREADS) as pool:
        reasons = pool.map(check, paths)

    changed = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
    if changed:
        raise UserError(
            f"{len(changed):,} of {len(paths):,} pictures or videos in {subset.image_folder} are not those "
            f"that the data was prepared with. The first ones:\n{first_lines(changed)}\n"
            f"Put the old ones back. To use the new ones, delete {subset.folder} and run `make data` again."
        )
