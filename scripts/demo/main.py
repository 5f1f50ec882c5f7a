"""Chat with a model in a page, with all visual tokens, reduced, and tuned, and see which tokens stay.

make demo RUN=runs/my-run ARGS="--port 7861"        python -m scripts.demo.main llava-hf/llava-1.5-7b-hf

The page is for this machine alone unless --host or --share ask for more.
"""

import argparse
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf
from starlette.middleware import Middleware

from scripts.demo.page import STYLE, ExamplePicture, NoOtherHosts, Page, gr
from scripts.demo.sessions import SharedModel
from train.cli import count, exit_on_user_error
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
"""Whose conversations are kept, each with a cache a row."""


def free_port(host: str, port: int) -> int:
    """The port, or, of 0, any that is free. Raises UserError for one that is taken, or a host that is not this machine."""
    try:
        with socket.create_server((host, port)) as taken:
            found: int = taken.getsockname()[1]
            return found
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host={host} --port={port} can't be opened: {error}\nGive another port, e.g. --port {port % 65_000 + 1}, or 0 "
            f"for any that is free"
        ) from error


def held_out_examples(run: Path) -> list[ExamplePicture]:
    """The first pictures that a run was evaluated with, those that can still be opened, each with a question about it."""
    settings, answers = run / "config.yaml", run / "answers_full.json"
    if not (settings.is_file() and answers.is_file()):
        return []
    folder = Path(OmegaConf.select(OmegaConf.load(settings), "data.image_folder", default=".")).expanduser()
    questions: dict[str, str] = {}
    for given in json.loads(answers.read_text()):
        questions.setdefault(given["image"], given["question"].replace(templates.IMAGE, "").strip())
    found: list[ExamplePicture] = []
    for image, question in questions.items():
        if len(found) == NUM_EXAMPLES:
            break
        with suppress(OSError, ValueError):  # gone, damaged, a video, or none at all
            found.append(ExamplePicture(open_picture(folder / image), question))
    return found


def open_rows(source: str, *, base: str | None, template: str | None, max_new_tokens: int) -> SharedModel:
    """Raises UserError for what is neither a finished run nor a model, or a model that nobody knows how to ask."""
    comparison = Comparison.open(source, base=base)
    if template is not None:
        comparison.processor.chat_template = chat_template(
            TEMPLATES[template], comparison.processor.tokenizer
        )
    if comparison.processor.chat_template is None:
        raise UserError(
            f"{source} has no chat template; say how it is to be asked: --template vicuna (LLaVA-1.5, LLaVA-NeXT with Vicuna), "
            f"mistral, or chatml (Qwen2, SmolLM2)"
        )
    return SharedModel(comparison, max_new_tokens=max_new_tokens)


def title_of(source: str, rows: SharedModel) -> str:
    """Markdown that says what answers here."""
    model, reducer = rows.comparison.family.model, rows.reducer(rows.budget)
    tuned = f", tuned for a budget of {' or '.join(map(str, rows.tuned))}" if rows.tuned else ""
    return f"`{source}`: {type(model).__name__} on {model.device}, {reducer}{tuned}."


def spare_the_proxy(host: str) -> None:
    """Have Gradio, which asks its own page whether it is there, not do so through the network's proxy."""
    known = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    os.environ["no_proxy"] = ",".join(filter(None, [known, host, "127.0.0.1", "localhost"]))


def serve(page: Page, *, host: str, port: int, share: bool) -> None:
    """Show the page until Ctrl-C."""
    spare_the_proxy(host)
    _, address, public = page.blocks.launch(
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
    print(f"the page: {public or address} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a run folder, or the folder or hub id of a model")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 shows the page to everyone in this network"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--share", action="store_true", help="a public address, through Gradio's servers")
    parser.add_argument("--base", help="where a run's base model is now")
    parser.add_argument("--template", choices=TEMPLATES, help="how a model without a chat template is asked")
    parser.add_argument("--max-new-tokens", type=count, default=128, help="of an answer")
    return parser.parse_args(arguments)


@exit_on_user_error
def main() -> None:
    """Open the model, then the page."""
    given = read_arguments()
    port = free_port(given.host, given.port)
    rows = open_rows(
        given.source, base=given.base, template=given.template, max_new_tokens=given.max_new_tokens
    )
    rows.warm_up()
    page = Page(rows, title=title_of(given.source, rows), examples=held_out_examples(Path(given.source)))
    serve(page, host=given.host, port=port, share=given.share)


if __name__ == "__main__":
    main()
