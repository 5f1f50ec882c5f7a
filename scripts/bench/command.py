"""What the benchmark commands share: their common arguments, and how they print."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from train.cli import count, writable

# Columns of a table that is printed into a file.
LOG_WIDTH = 128


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=count, default=5, help="rounds, whose median is shown")
    parser.add_argument("--json", type=writable, help="file to write all figures to")
    return parser


def check_gpu(parser: argparse.ArgumentParser, shapes: Sequence[str]) -> None:
    """Exit with a message if a shape needs a GPU and this machine has none."""
    # The published sizes would take hours on a CPU, and more memory than most machines have.
    large = [name for name in shapes if name != "tiny"]
    if large and not torch.cuda.is_available():
        parser.error(f"--shape {large[0]} needs a GPU, and there is none; `--shape tiny` is for a CPU")


def print_environment(record: Mapping[str, Any]) -> None:
    """Print what the figures were measured on."""
    print(", ".join(f"{name} {value}" for name, value in record.items()))


def print_table(table: Table, *lines: str) -> None:
    """Print a table, and lines below it."""
    # A file has no width, and rich would wrap the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
    console.print(table, *lines, sep="\n")
