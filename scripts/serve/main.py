"""Serve a tuned model with vLLM behind OpenAI's API, with a tenth of the visual tokens.

make serve RUN=runs/my-run          python -m scripts.serve.main runs/my-run --port 8000
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import gettempdir, mkstemp

from scripts.export.main import export, export_parser
from scripts.serve.environment import has_gpu, serve_python
from scripts.serve.request import example_request
from scripts.serve.server import Server, ServerError, serving, stop_on_signals, unused_port
from train.cli import exit_on_user_error
from train.hardware import native_dtype
from vzip import UserError
from vzip.runs.meta import CONFIG, META, is_export, locate, read_meta, reducers_of

LOG_LINES = 30
"""Lines of the server's log that are shown if it does not start."""


def served_folder(source: str, base: str | None) -> Path:
    """Return the export to serve: the source itself, or the run's, which is written if needed.

    Raises:
        UserError: the source is neither a finished run nor an export.
    """
    folder = locate(source)
    if folder is None:
        # A config.json that can't be read is damaged, and says nothing about the model.
        is_export(Path(source))
        raise UserError(
            f"{source} is a base model, which is not tuned for fewer tokens; give a run folder, or an "
            f"export (`make export TO=hf`)"
        )
    read_meta(folder)
    if is_export(folder):
        return folder

    # An export that is older than the run's projector belongs to an earlier run of that name.
    target = folder / "export" / "hf"
    config = target / CONFIG
    if config.is_file() and config.stat().st_mtime >= (folder / META).stat().st_mtime:
        return target

    print(f"exporting {folder}", flush=True)
    arguments = [str(folder), "hf", "--force"]
    if base is not None:
        arguments += ["--base", base]
    return export(export_parser().parse_args(arguments))


def _announce(server: Server, budgets: list[int]) -> None:
    """Tell how to ask the server."""
    print(f"{server.model} is served at {server.address}/v1 (Ctrl-C ends it; log: {server.log})\n")
    counts = ", ".join(str(budget) for budget in budgets)
    if len(budgets) > 1:
        print(f"A request names its budget, one of {counts}; without one it gets {budgets[0]}.\n")
    print(f"Ask about PICTURE.png:\n\n{example_request(server, budgets)}", flush=True)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line. Options that are not ours are vLLM's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are handed to vLLM, e.g. --max-model-len 4096.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a finished run, or the folder or hub id of an export")
    parser.add_argument("--base", help="folder or hub id of the base model, if it has moved since the run")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--name", help="the model's name in requests (default: that of its folder)")
    return parser.parse_known_args()


def new_log() -> Path:
    """Make an empty file for what the server prints."""
    # Not in the run's folder, which may be read-only. The descriptor is not needed.
    descriptor, name = mkstemp(prefix="vzip-serve-", suffix=".log", dir=gettempdir())
    os.close(descriptor)
    return Path(name)


def with_log(error: ServerError, log: Path) -> UserError:
    """Say why a server has ended, with the end of its log."""
    lines = log.read_text(errors="replace").splitlines()

    # The plugin's message is one line of the traceback that vLLM prints.
    prefix = f"{UserError.__name__}: "
    for line in lines:
        if prefix in line:
            return UserError(f"{line.partition(prefix)[2]}\nThe whole log is {log}")

    end = "\n".join(lines[-LOG_LINES:])
    return UserError(f"{error}. The end of its log:\n{end}\nThe whole log is {log}")


def machine_options() -> list[str]:
    """Return the options of vLLM that suit this machine."""
    if has_gpu():
        return []

    # Compiling takes minutes. A processor without instructions for bf16 is several times faster in
    # float32.
    options = ["--enforce-eager"]
    if native_dtype() != "bfloat16":
        options += ["--dtype", native_dtype()]
    return options


@exit_on_user_error
def main() -> None:
    """Export the run if needed, start vLLM, print a request to copy, and wait for Ctrl-C."""
    arguments, options = _parse()
    stop_on_signals()

    # What can be refused is refused before vLLM is installed.
    try:
        port = unused_port(arguments.host, arguments.port)
    except ServerError as error:
        raise UserError(str(error)) from error
    folder = served_folder(arguments.source, arguments.base)
    budgets = list(reducers_of(read_meta(folder)))
    python = serve_python()

    # The user's options come last: vLLM takes the last one of each.
    options = [*machine_options(), *options]

    log = new_log()
    print(f"starting vLLM, which takes a minute or more (log: {log})", flush=True)
    name = arguments.name or Path(arguments.source).resolve().name
    address = (arguments.host, port)
    try:
        with serving(python, folder, model=name, log=log, options=options, address=address) as server:
            _announce(server, budgets)
            _wait_for_end(server)
    except KeyboardInterrupt:
        # Ctrl-C is how this command ends, so it is no error.
        print("\nstopped", flush=True)
    except ServerError as error:
        raise with_log(error, log) from error


def _wait_for_end(server: Server) -> None:
    """Wait for ever, or until the server ends by itself, which raises ServerError."""
    while server.process.poll() is None:
        time.sleep(0.5)
    raise ServerError(f"vLLM ended with code {server.process.returncode}")


if __name__ == "__main__":
    main()
