"""Chat with a model in a page: full, training-free and tuned side by side, and the kept tokens.

make demo RUN=runs/my-run ARGS="--port 7861"
python -m scripts.demo.main llava-hf/llava-1.5-7b-hf

Only this machine can open the page, unless --host or --share opens it to others. Then it should ask
for a password: --auth USER:PASSWORD, or the variable VZIP_DEMO_AUTH, which no list of processes
shows. Ctrl-C ends the command.
"""

import argparse
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from starlette.middleware import Middleware

from scripts.demo.guard import MAX_FILE_MB, ExpectedRequests, NoOtherHosts, gr
from scripts.demo.page import ExamplePicture, Page
from scripts.demo.served import ServedModel
from scripts.demo.sessions import SharedModel
from scripts.demo.style import STYLE
from train.cli import count, exit_on_user_error
from train.runs import FinishedRun
from vzip import Comparison, UserError
from vzip.pictures import open_picture
from vzip.templates import encode as templates
from vzip.templates.jinja import chat_template

TEMPLATES = {
    "vicuna": templates.vicuna(),
    "mistral": templates.mistral(),
    "chatml": templates.chatml("You are a helpful assistant."),
}
NUM_EXAMPLES = 8
MAX_VISITORS = 100
"""Number of visitors whose conversations are in memory. The one who was away longest is forgotten."""
AUTH = "VZIP_DEMO_AUTH"
"""Environment variable that --auth can be given in."""


def free_port(host: str, port: int) -> int:
    """Return the port, or any free port for 0.

    Raises:
        UserError: the port is taken, or the host is not this machine.
    """
    # The port is closed again here: the page opens it after the model is loaded.
    try:
        with socket.create_server((host, port)) as server:
            free: int = server.getsockname()[1]
            return free
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host={host} --port={port} can't be opened: {error}\n"
            f"Give another port, e.g. --port {port % 65_000 + 1}, or 0 for any that is free"
        ) from error


def held_out_examples(run: Path) -> list[ExamplePicture]:
    """Return the first pictures that a run was evaluated with, each with a question about it."""
    # A base model, or a run without held-out questions, offers no examples.
    finished = FinishedRun(run)
    answers = finished.answers("full")
    if not finished.has_settings or answers is None:
        return []

    # A picture may have several questions. The page offers the first one.
    questions: dict[str, str] = {}
    for answer in answers:
        question = answer["question"].replace(templates.IMAGE, "").strip()
        questions.setdefault(answer["image"], question)

    # Open pictures until the gallery is full.
    folder = Path(str(finished.setting("data.image_folder") or ".")).expanduser()
    examples: list[ExamplePicture] = []
    for image, question in questions.items():
        if len(examples) == NUM_EXAMPLES:
            break
        # A run from somebody else may name a file outside the folder, which visitors must not see.
        if Path(image).is_absolute() or ".." in Path(image).parts:
            continue
        # Skip pictures that are gone or damaged, videos, and questions without a picture.
        with suppress(OSError, ValueError):
            examples.append(ExamplePicture(open_picture(folder / image), question))

    return examples


def open_model(
    source: str,
    *,
    base: str | None,
    template: str | None,
    max_new_tokens: int,
    served: ServedModel | None = None,
) -> SharedModel:
    """Load a run or a model.

    Args:
        source: a run folder, or the folder or hub id of a model.
        base: folder or hub id of a run's base model, if it has moved.
        template: a name in `TEMPLATES`, for a model without a chat template.
        max_new_tokens: most tokens of an answer.
        served: a model that a server answers for, as one more setting.

    Raises:
        UserError: the source is neither a finished run nor a model, or it has no chat template.
    """
    comparison = Comparison.open(source, base=base)
    processor = comparison.processor

    # A run knows the template that it was tuned with, but a base model may have none.
    if template is not None:
        processor.chat_template = chat_template(TEMPLATES[template], processor.tokenizer)

    if processor.chat_template is None:
        raise UserError(
            f"{source} has no chat template; name the one it was trained with: --template vicuna "
            f"(LLaVA-1.5, LLaVA-NeXT with Vicuna), mistral, or chatml (Qwen2, SmolLM2)"
        )
    return SharedModel(comparison, max_new_tokens=max_new_tokens, served=served)


def title_of(source: str, model: SharedModel) -> str:
    """Say in Markdown which model answers."""
    network = model.comparison.family.model
    reducer = model.reducer(model.default_budget)
    # Visitors need not know where the run is on this machine.
    path = Path(source)
    name = path.resolve().name if path.exists() else source
    title = f"`{name}`: {type(network).__name__} on {network.device}, {reducer}"

    if model.tuned_budgets:
        budgets = " or ".join(str(budget) for budget in model.tuned_budgets)
        title += f", tuned for a budget of {budgets}"
    return f"{title}."


def spare_the_proxy(host: str) -> None:
    """Let Gradio reach its own page without the network's proxy.

    When the page starts, Gradio sends it a request, which a proxy would not deliver.
    """
    # Keep the hosts that the user has excluded already.
    known = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    hosts = [known, host, "127.0.0.1", "localhost"]
    os.environ["no_proxy"] = ",".join(name for name in hosts if name)


def read_auth(text: str | None) -> tuple[str, str] | None:
    """Split USER:PASSWORD into its two parts. Return None if it is not given.

    Without the option, the environment variable counts.

    Raises:
        UserError: one of the two is missing. The message does not repeat them.
    """
    if text is None:
        text = os.environ.get(AUTH)
    if text is None:
        return None

    user, _, password = text.partition(":")
    if not user or not password:
        raise UserError(f"--auth (or {AUTH}) must be USER:PASSWORD, and neither may be empty")
    return user, password


def is_open_to_others(host: str, *, share: bool) -> bool:
    """Whether other machines can reach the page."""
    if share:
        return True
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name, e.g. localhost.
        return host != "localhost"


@contextmanager
def uploads_folder() -> Iterator[None]:
    """Let Gradio keep uploads in a folder that only this user can read, and delete it in the end.

    Its default is one folder for all programs and users of the machine.
    """
    with TemporaryDirectory(prefix="vzip-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


@contextmanager
def opened(
    page: Page, *, host: str, port: int, share: bool = False, auth: tuple[str, str] | None = None
) -> Iterator[str]:
    """Yield the address of the page, which visitors can use while the block runs."""
    # With `prevent_thread_lock` the call returns: the page runs in threads of its own.
    spare_the_proxy(host)
    _, address, public_address = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=auth,
        quiet=True,
        prevent_thread_lock=True,
        css=STYLE,
        theme=gr.themes.Default(primary_hue="blue"),
        footer_links=[],
        max_file_size=f"{MAX_FILE_MB}mb",
        state_session_capacity=MAX_VISITORS,
        ssr_mode=False,
        # Nobody needs these records of what visitors did.
        enable_monitoring=False,
        run_history=False,
        app_kwargs={"middleware": [Middleware(NoOtherHosts), Middleware(ExpectedRequests)]},
    )
    try:
        yield public_address or address
    finally:
        page.model.thread.stop()
        page.blocks.close(verbose=False)


def serve(page: Page, *, host: str, port: int, share: bool, auth: tuple[str, str] | None) -> None:
    """Show the page until Ctrl-C raises KeyboardInterrupt."""
    if auth is None and is_open_to_others(host, share=share):
        print(
            "warning: everyone who can reach this page can use it and its model; "
            f"ask for a password with --auth USER:PASSWORD, or with {AUTH} in the environment",
            flush=True,
        )
    with opened(page, host=host, port=port, share=share, auth=auth) as address:
        print(f"the page: {address} (Ctrl-C ends it)", flush=True)
        Event().wait()


def parse_demo_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a run folder, or the folder or hub id of a model")
    add("--host", default="127.0.0.1", help="0.0.0.0 shows the page to everyone in this network")
    add("--port", type=int, default=7860, help="port of the page; 0 takes any free one")
    add("--share", action="store_true", help="get a public address from Gradio's servers")
    add("--auth", metavar="USER:PASSWORD", help=f"ask visitors for these; or set {AUTH} to them")
    add("--base", help="folder or hub id of a run's base model, if it has moved")
    add("--template", choices=TEMPLATES, help="chat template, for a model that has none")
    add("--max-new-tokens", type=count, default=128, help="most tokens of an answer")
    add("--served", metavar="ADDRESS", help="show a served model too, e.g. http://127.0.0.1:8000")
    return parser.parse_args(arguments)


@exit_on_user_error
def main() -> None:
    """Load the model, then show the page."""
    arguments = parse_demo_arguments()

    auth = read_auth(arguments.auth)

    # Ctrl-C is how this command ends, so it is not an error.
    with suppress(KeyboardInterrupt), uploads_folder():
        # Look for the port first: loading the model takes minutes.
        port = free_port(arguments.host, arguments.port)
        served = None if arguments.served is None else ServedModel(arguments.served)
        model = open_model(
            arguments.source,
            base=arguments.base,
            template=arguments.template,
            max_new_tokens=arguments.max_new_tokens,
            served=served,
        )
        model.warm_up()

        # Without held-out pictures, visitors upload their own.
        page = Page(
            model,
            title=title_of(arguments.source, model),
            examples=held_out_examples(Path(arguments.source)),
        )
        serve(page, host=arguments.host, port=port, share=arguments.share, auth=auth)


if __name__ == "__main__":
    main()
