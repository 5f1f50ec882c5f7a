"""Fetch a model's data: the instruction file, and the pictures of the subset that is drawn from it.

make data MODEL=llava-7b        python -m scripts.prepare.fetch model=llava-7b data.fraction=0.05 seed=1
"""

import codecs
from collections import Counter
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from data.examples.bad_examples import check_bad_share
from data.examples.prepare import MANIFEST, Subset, prepare
from data.examples.table import open_table
from data.fetch.file import fetch_file, hub_logins
from data.fetch.http import Client, NotFoundError, TransientError
from data.fetch.media import BAD_PATH, FORBIDDEN
from data.fetch.sources import open_sources
from data.locks import locked
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from vzip import UserError

HINTS = {
    b"<": "it is a web page, as portals and pages for a login send instead of a file",
    b"\x1f\x8b": "it is packed with gzip; unpack it, and put it at data.path",
    b"PK": "it is a zip file; unpack it, and put the instruction file at data.path",
}
"""What else may come with status 200, by its first bytes."""


def check_instructions(path: Path) -> None:
    """Raise NotFoundError if a downloaded file can't be a JSON list, or JSON lines.

    It reads only both ends of the file. `check_examples` reads all of it.
    """
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(max(0, path.stat().st_size - 1024))
        end = file.read().rstrip()

    if not start:
        raise NotFoundError("it is empty")

    # A list that does not end was cut off on the way.
    pairs = {b"[": b"]", b"{": b"}"}
    if start[:1] in pairs and end.endswith(pairs[start[:1]]):
        return
    if start[:1] in pairs:
        raise NotFoundError("its end is missing")

    for first_bytes, hint in HINTS.items():
        if start.startswith(first_bytes):
            raise NotFoundError(hint)
    raise NotFoundError(f"it starts with {start[:20]!r}, and not with a JSON list or JSON lines")


def fetch_instructions(address: str, path: Path, client: Client) -> None:
    """Download the instruction file, unless it is there. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # If two commands start at once, the second one waits and then finds the file.
        with locked(path.with_name(f"{path.name}.lock"), wait=True):
            if not path.exists():
                fetch_file(address, path, check=check_instructions, client=client)
    except (NotFoundError, TransientError) as error:
        raise UserError(
            f"data.address={address} could not be fetched: {error}\n"
            f"Check the network, give another address, or put the file at data.path={path}. If the file is "
            f"on the Hugging Face hub and needs a login, run `hf auth login` first"
        ) from error
    except OSError as error:
        # Other errors of the disk, such as a full one, have a message of their own.
        if error.errno not in FORBIDDEN | BAD_PATH:
            raise
        raise UserError(
            f"data.path={path} can't be written: {error.strerror}; set data.path to a file in a "
            f"folder that can be written to, or put the file there"
        ) from error


def check_examples(path: Path, address: str | None) -> None:
    """Raise UserError, with the cure, if the file at `data.path` holds no examples."""
    try:
        table = open_table(path)
        check_bad_share(table.bad_examples(), len(table))
    except UserError as error:
        # The file may come from an address that once sent something else.
        if address is None or not path.is_file():
            raise
        raise UserError(
            f"{error}\nIf the file came from data.address={address}, delete it and run the same command "
            f"again: it is fetched again"
        ) from error


def print_fetched(subset: Subset) -> None:
    """Print how many examples were drawn, left out and replaced, by source."""
    manifest = subset.manifest
    num_drawn = manifest["num_rows_by_source"]

    # Count by source. An example that is bad in the data file itself was never drawn, so it has no
    # "replaced".
    left_out: Counter[str] = Counter()
    replaced: Counter[str] = Counter()
    for example in manifest["bad_rows"]:
        left_out[example["source"]] += 1
        replaced[example["source"]] += example.get("replaced", False)

    table = Table(
        "source", "examples", "left out", "replaced", title=subset.folder.name, title_justify="left"
    )

    # A source may have lost all its examples, so the names come from both counts.
    for source in sorted({*num_drawn, *left_out}):
        table.add_row(
            source,
            f"{num_drawn.get(source, 0):,}",
            f"{left_out[source]:,}",
            f"{replaced[source]:,}",
        )
    table.add_row(
        "all",
        f"{manifest['num_rows']:,}",
        f"{left_out.total():,}",
        f"{replaced.total():,}",
    )

    # Below the table, name what was left out, and where the manifest lies.
    console = Console()
    console.print(table)
    for line in subset.left_out:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"hash {manifest['hash']}\n{subset.folder / MANIFEST}", soft_wrap=True, highlight=False)


@hydra.main(config_path="../../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    check(cfg)

    # Fetch the file only if it is missing: the user may have put it there.
    path = Path(cfg.data.path).expanduser()
    client = Client(logins=hub_logins())
    if not path.exists() and cfg.data.address:
        fetch_instructions(cfg.data.address, path, client)
    check_examples(path, cfg.data.address)

    # Held-out questions have pictures of their own, so fetch those too.
    selections = [config.selection(cfg)]
    if config.asks_questions(cfg):
        selections.append(config.held_out(cfg))

    # Preparing a selection fetches the pictures that it lacks.
    sources = open_sources(cfg.data.pictures, client)
    for selection in selections:
        subset = prepare(selection, sources=sources, replace_unreachable=cfg.data.replace_unreachable)
        print_fetched(subset)


if __name__ == "__main__":
    config.register()
    main()
