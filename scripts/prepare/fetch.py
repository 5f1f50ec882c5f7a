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
from data.fetch.http import Client, NotFoundError, TransientError, fetch_file
from data.fetch.sources import open_sources
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from vzip import UserError


def fetch_instructions(address: str, path: Path) -> None:
    """Raises UserError if the file can't be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock"):  # of two commands one fetches
            if not path.exists():
                fetch_file(address, path, title=path.name)
    except (NotFoundError, TransientError) as error:
        raise UserError(
            f"data.address={address} could not be fetched: {error}\nCheck the network, give another address, or put the file "
            f"at data.path={path}"
        ) from error


def print_fetched(subset: Subset) -> None:
    """What was drawn and what was left out, by source."""
    manifest = subset.manifest
    left_out, replaced = Counter(), Counter()
    for row in manifest["bad_rows"]:
        left_out[row["source"]] += 1
        replaced[row["source"]] += row.get("replaced", False)
    table = Table("source", "rows", "left out", "replaced", title=subset.folder.name, title_justify="left")
    counts = manifest["num_rows_by_source"]
    for source in sorted({*counts, *left_out}):
        table.add_row(
            source, *(f"{count:,}" for count in (counts.get(source, 0), left_out[source], replaced[source]))
        )
    table.add_row(
        "all", *(f"{count:,}" for count in (manifest["num_rows"], left_out.total(), replaced.total()))
    )
    console = Console()
    console.print(table)
    for line in subset.left_out:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"hash {manifest['hash']}\n{subset.folder / MANIFEST}", soft_wrap=True, highlight=False)


@hydra.main(config_path="../../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    check(cfg)
    path, client = Path(cfg.data.path).expanduser(), Client()
    if not path.exists() and cfg.data.address:
        fetch_instructions(cfg.data.address, path)
    places = open_sources(cfg.data.pictures, client)
    for wanted in [config.selection(cfg), *([config.held_out(cfg)] if config.asks_questions(cfg) else [])]:
        print_fetched(prepare(wanted, places=places, replace_unreachable=cfg.data.replace_unreachable))


if __name__ == "__main__":
    config.register()
    main()
