"""What the page's server refuses before any of the page's own code runs."""

import os
import shutil
import tempfile
from typing import Any

# Gradio reads these when it is imported. It would send data about the page to its servers, and it
# would go through its last 10,000 events after each event, for a monitor that nobody sees here.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.demo.uploads import uploaded_file
from vzip import UserError

MAX_FILE_MB = 20
"""Largest picture that can be uploaded."""
MAX_REQUEST_MB = 1
"""Largest request that uploads nothing. Those of the page have a few kilobytes."""
POSTS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/upload", "/login")
"""What the page's own script sends. Gradio's server takes more, e.g. recordings that it converts."""
MIN_FREE_MB = 200
"""Uploads are refused while the disk has less space than that. They are deleted after some time."""


class NoOtherHosts:
    """Middleware that tells browsers to load nothing for the page from any other host."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An answer's headers are sent first, in a message of their own.
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", self.POLICY)
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


class ExpectedRequests:
    """Middleware that refuses requests which the page never sends, or which there is no room for.

    It does so before it reads them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._why_refused(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _why_refused(self, scope: Scope) -> PlainTextResponse | None:
        """Return the answer to a request that is refused; None for any other request."""
        path = scope["path"].rstrip("/")
        if scope["method"] not in ("GET", "HEAD") and not path.endswith(POSTS):
            return PlainTextResponse("This page has no such service.", status_code=404)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")

        # Browsers always send the length. Without it, a request may have no end.
        if b"transfer-encoding" in headers:
            return PlainTextResponse("Send the length of the request.", status_code=411)

        # A form around the file takes a little more than the file itself.
        limit_mb = MAX_REQUEST_MB
        if path.endswith("/upload"):
            limit_mb += MAX_FILE_MB
            if shutil.disk_usage(tempfile.gettempdir()).free < MIN_FREE_MB * 2**20:
                return PlainTextResponse("There is no room for uploads; try again later.", status_code=507)
        if length.isdigit() and int(length) > limit_mb * 2**20:
            return PlainTextResponse(f"This request has more than {limit_mb} MB.", status_code=413)
        return None


class UploadsOnly(gr.Blocks):
    """Blocks whose events take no file but those that were uploaded to the page.

    Gradio itself checks only files that are marked as such, and it fetches those that are named by an
    address.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Check the inputs of an event before Gradio reads any of them."""
        # A list of what is left to check instead of recursion, because a request may nest deeply.
        unchecked: list[Any] = list(inputs)
        while unchecked:
            value = unchecked.pop()
            if isinstance(value, list):
                unchecked += value
            elif isinstance(value, dict):
                unchecked += value.values()
                if value.get("path") is not None:
                    self._check_file(value)

        prepared: list[Any] = await super().preprocess_data(block_fn, inputs, state, explicit_call)
        return prepared

    def _check_file(self, file: dict[str, Any]) -> None:
        try:
            uploaded_file(file, get_upload_folder())
        except UserError as error:
            # Gradio shows this error on the page, and writes no traceback into the log.
            raise gr.Error(str(error), print_exception=False) from error
