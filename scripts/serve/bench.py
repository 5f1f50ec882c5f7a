"""Serve a model with all visual tokens and with a tenth of them, under the same load.

make bench-serve                                      python -m scripts.serve.bench
make bench-serve ARGS="--run runs/my-run"             a tuned run instead of random weights
make bench-serve ARGS="--shape llava-7b --json FILE"  a published size, on a GPU

Two servers of the same plugin run at the same time, and one of them keeps all tokens. They take
turns: full, reduced, reduced, full. The one that waits uses no CPU time. Each request
streams, and has a picture of its own.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import count as count_up
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.progress import progress
from scripts.bench.command import check_gpu, print_environment
from scripts.common.timing import where
from scripts.serve.environment import CPU_PACKAGE, PACKAGE, has_gpu, serve_python
from scripts.serve.load import LoadResult, noise_picture, put_load
from scripts.serve.main import machine_options, new_log, served_folder, with_log
from scripts.serve.models import SHAPES, all_tokens, reduced_by, save_random_model, served_shape
from scripts.serve.server import Server, ServerError, serving, stop_on_signals
from scripts.serve.table import ORDER, markdown, summarize
from train.cli import exit_on_user_error, writable
from train.hardware import best_device
from vzip import UserError
from vzip.files import write_json
from vzip.runs.meta import read_meta


@dataclass(frozen=True)
class Load:
    """How much is asked."""

    requests: Mapping[int, int]
    """Requests of a turn, by the number of them at a time."""
    num_new: int
    """Tokens of an answer."""


CPU_LOAD = Load({1: 4, 8: 16, 32: 48}, num_new=16)
GPU_LOAD = Load({1: 32, 8: 128, 32: 512}, num_new=64)

COMMON_OPTIONS = ["--max-num-seqs", "32", "--limit-mm-per-prompt", '{"image": 1}']


@dataclass(frozen=True)
class ServedTarget:
    """A folder that vLLM can serve, and its options for each setting."""

    folder: Path
    options: Mapping[str, Sequence[str]]


def _tuned_target(run: str, base: str | None) -> ServedTarget:
    """Serve a finished run, or its export."""
    folder = served_folder(run, base)
    return ServedTarget(folder, {"full": all_tokens(read_meta(folder)), "reduced": []})


def _random_target(name: str, folder: Path) -> ServedTarget:
    """Serve a shape with random weights."""
    shape = served_shape(name)
    save_random_model(shape, folder)
    random = ["--load-format", "dummy", "--dtype", str(shape.dtype).removeprefix("torch.")]
    return ServedTarget(folder, {"full": [*all_tokens(), *random], "reduced": [*reduced_by(shape), *random]})


@contextmanager
def _both(target: ServedTarget) -> Iterator[dict[str, Server]]:
    """Serve a target in both settings."""
    python = serve_python()

    # Both servers share one GPU, so each gets a little less than half of its memory.
    options = [*machine_options(), *COMMON_OPTIONS]
    if has_gpu():
        options += ["--gpu-memory-utilization", "0.45"]

    with ExitStack() as stack:
        servers = {}
        for setting, more in target.options.items():
            log = new_log()
            print(f"starting vLLM, {setting} (log: {log})", flush=True)
            try:
                start = serving(python, target.folder, model=setting, log=log, options=[*options, *more])
                servers[setting] = stack.enter_context(start)
            except ServerError as error:
                raise with_log(error, log) from error
        yield servers


def measure(servers: Mapping[str, Server], load: Load) -> dict[int, dict[str, list[LoadResult]]]:
    """Put the load on both servers in turns. Return the results by concurrency and setting."""
    seeds = count_up()

    def turn(setting: str, concurrency: int, num_requests: int) -> LoadResult:
        # No picture comes twice, because a server remembers those that it has seen.
        pictures = [noise_picture(next(seeds)) for _ in range(num_requests)]
        return put_load(servers[setting], pictures, concurrency=concurrency, num_new=load.num_new)

    # The first requests wait for what a server prepares once.
    for setting in servers:
        turn(setting, 2, 2)

    results: dict[int, dict[str, list[LoadResult]]] = {}
    with progress(None, total=len(load.requests) * len(ORDER), title="load", unit="turn") as bar:
        for concurrency, num_requests in load.requests.items():
            of_settings: dict[str, list[LoadResult]] = {setting: [] for setting in servers}
            for setting in ORDER:
                of_settings[setting].append(turn(setting, concurrency, num_requests))
                bar.update()
            results[concurrency] = of_settings
    return results


def _parse_load_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--shape", choices=SHAPES, default="tiny", help="a model with random weights")
    target.add_argument("--run", help="a finished run, or an export, instead")
    parser.add_argument("--base", help="folder or hub id of a run's base model, if it has moved")
    parser.add_argument("--json", type=writable, help="file to write all figures to")
    arguments = parser.parse_args()
    check_gpu(parser, [arguments.shape])
    if arguments.base and not arguments.run:
        parser.error("--base belongs to --run; give the run too")
    return arguments


@exit_on_user_error
def main() -> None:
    """Start both servers, measure, and print a table that fits into RESULTS.md."""
    arguments = _parse_load_arguments()
    stop_on_signals()
    load = GPU_LOAD if has_gpu() else CPU_LOAD
    environment: dict[str, Any] = {
        "vllm": PACKAGE if has_gpu() else CPU_PACKAGE,
        **where(best_device()),
    }
    print_environment(environment)

    with TemporaryDirectory(prefix="vzip-bench-") as scratch:
        if arguments.run is None:
            target = _random_target(arguments.shape, Path(scratch))
        else:
            target = _tuned_target(arguments.run, arguments.base)
        with _both(target) as servers:
            try:
                results = measure(servers, load)
            except (ServerError, OSError, HTTPException) as error:
                raise UserError(f"a server failed under the load: {error}; its log says why") from error

    figures = summarize(results)
    print(markdown(figures))
    if arguments.json is not None:
        name = arguments.run or arguments.shape
        record = {"model": name, "environment": environment, "new_tokens": load.num_new}
        write_json(arguments.json, {**record, "figures": figures})


if __name__ == "__main__":
    main()
