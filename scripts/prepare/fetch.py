"""Fetch a model's data: the instruction file, and the pictures of the subset that is drawn from it.

make data MODEL=llava-7b        python -m scripts.prepare.fetch model=llava-7b data.fraction=0.05 seed=1
"""

from collections import Counter
from pathlib import Path

import hydra
from filelock import FileLock
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from data.examples.prepare import MANIFEST, Subset, prepare
from data.fetch.file import fetch_file
from data.fetch.http import Client, NotFoundError, TransientError
from data.fetch.sources import open_sources
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from vzip import UserError


def fetch_instructions(address: str, path: Path) -> None:
    """Download the instruction file, unless it is there. Raises UserError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # If two commands start at once, the second one waits and then finds the file.
        with FileLock(f"{path}.lock"):
            if not path.exists():
                fetch_file(address, path)
    except (NotFoundError, TransientError) as error:
        raise UserError(
            f"data.address={address} could not be fetched: {error}\n"
            f"Check the network, give another address, or put the file at data.path={path}"
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
    if not path.exists() and cfg.data.address:
        fetch_instructions(cfg.data.address, path)

    # Held-out questions have pictures of their own, so fetch those too.
    selections = [config.selection(cfg)]
    if config.asks_questions(cfg):
        selections.append(config.held_out(cfg))

    # Preparing a selection fetches the pictures that it lacks.
    sources = open_sources(cfg.data.pictures, Client())
    for selection in selections:
        subset = prepare(selection, sources=sources, replace_unreachable=cfg.data.replace_unreachable)
        print_fetched(subset)


if __name__ == "__main__":
    config.register()
    main()
