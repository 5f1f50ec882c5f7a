"""Chat with a model in a page: full, training-free and tuned side by side, and the kept tokens.

make demo RUN=runs/my-run ARGS="--port 7861"
python -m scripts.demo.main llava-hf/llava-1.5-7b-hf

Only this machine can open the page, unless --host or --share opens it to others. Ctrl-C ends the
command.
"""

import argparse
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event

from starlette.middleware import Middleware

from scripts.demo.page import STYLE, ExamplePicture, NoOtherHosts, Page, gr
from scripts.demo.sessions import SharedModel
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
MAX_FILE_MB = 20
MAX_VISITORS = 8
"""Number of visitors whose sessions stay in memory. Each has a KV cache in every setting."""


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
    folder = Path(finished.setting("data.image_folder", ".")).expanduser()
    examples: list[ExamplePicture] = []
    for image, question in questions.items():
        if len(examples) == NUM_EXAMPLES:
            break
        # Skip pictures that are gone or damaged, videos, and questions without a picture.
        with suppress(OSError, ValueError):
            examples.append(ExamplePicture(open_picture(folder / image), question))

    return examples


def open_model(source: str, *, base: str | None, template: str | None, max_new_tokens: int) -> SharedModel:
    """Load a run or a model.

    Args:
        source: a run folder, or the folder or hub id of a model.
        base: folder or hub id of a run's base model, if it has moved.
        template: a name in `TEMPLATES`, for a model without a chat template.
        max_new_tokens: most tokens of an answer.

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
    return SharedModel(comparison, max_new_tokens=max_new_tokens)


def title_of(source: str, model: SharedModel) -> str:
    """Say in Markdown which model answers."""
    network = model.comparison.family.model
    reducer = model.reducer(model.default_budget)
    title = f"`{source}`: {type(network).__name__} on {network.device}, {reducer}"

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


def serve(page: Page, *, host: str, port: int, share: bool) -> None:
    """Show the page until Ctrl-C raises KeyboardInterrupt."""
    # With `prevent_thread_lock` the call returns, so that Ctrl-C ends the wait below.
    spare_the_proxy(host)
    _, address, public_address = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        css=STYLE,
        theme=gr.themes.Default(primary_hue="blue"),
        footer_links=[],
        max_file_size=f"{MAX_FILE_MB}mb",
        state_session_capacity=MAX_VISITORS,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(NoOtherHosts)]},
    )
    print(f"the page: {public_address or address} (Ctrl-C ends it)", flush=True)

    # The page runs in threads of its own. This one waits for Ctrl-C, and then ends them.
    try:
        Event().wait()
    finally:
        page.model.stop()
        page.blocks.close(verbose=False)


def parse_demo_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a run folder, or the folder or hub id of a model")
    add("--host", default="127.0.0.1", help="0.0.0.0 shows the page to everyone in this network")
    add("--port", type=int, default=7860, help="port of the page; 0 takes any free one")
    add("--share", action="store_true", help="get a public address from Gradio's servers")
    add("--base", help="folder or hub id of a run's base model, if it has moved")
    add("--template", choices=TEMPLATES, help="chat template, for a model that has none")
    add("--max-new-tokens", type=count, default=128, help="most tokens of an answer")
    return parser.parse_args(arguments)


@exit_on_user_error
def main() -> None:
    """Load the model, then show the page."""
    arguments = parse_demo_arguments()

    # Ctrl-C is how this command ends, so it is not an error.
    with suppress(KeyboardInterrupt):
        # Look for the port first: loading the model takes minutes.
        port = free_port(arguments.host, arguments.port)
        model = open_model(
            arguments.source,
            base=arguments.base,
            template=arguments.template,
            max_new_tokens=arguments.max_new_tokens,
        )
        model.warm_up()

        # Without held-out pictures, visitors upload their own.
        page = Page(
            model,
            title=title_of(arguments.source, model),
            examples=held_out_examples(Path(arguments.source)),
        )
        serve(page, host=arguments.host, port=port, share=arguments.share)


if __name__ == "__main__":
    main()
