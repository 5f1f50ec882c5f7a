"""Ask a served model about many pictures at once, and measure how it answers."""

import base64
import http.client
import io
import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scripts.serve.request import chat_body
from scripts.serve.server import Server, ServerError, read_page

SIDE = 336
"""Side in pixels of the pictures."""

BLOTCHES = 24
"""Blotches of colour along a side. Pure noise would make files of a size that no photograph has."""

QUESTION = "What is in the picture?"

WATCH_SECONDS = 0.1
"""Time between two looks at the cache."""

ANSWER_SECONDS = 600
"""Most seconds that an answer may take."""


def noise_picture(seed: int) -> str:
    """Make a PNG of random blotches, in base64. Every seed gives another one."""
    blotches = np.random.default_rng(seed).integers(0, 256, (BLOTCHES, BLOTCHES, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blotches).resize((SIDE, SIDE)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class TimedAnswer:
    """When the parts of an answer arrived."""

    first_token_s: float
    """Seconds from the request to the first token."""
    whole_s: float
    """Seconds from the request to the end."""
    prompt_tokens: int
    new_tokens: int

    @property
    def token_s(self) -> float:
        """Seconds for each token after the first one."""
        return (self.whole_s - self.first_token_s) / max(self.new_tokens - 1, 1)


def ask(server: Server, picture: str, *, num_new: int) -> TimedAnswer:
    """Ask about a picture, and read the answer while it is written.

    Raises:
        ServerError: the server refuses the request.
    """
    settings = {
        "max_tokens": num_new,
        "min_tokens": num_new,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(chat_body(server.model, QUESTION, picture, **settings))
    address = server.address.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=ANSWER_SECONDS)
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise ServerError(f"vLLM answers {response.status}: {response.read(2000).decode()}")

        # The first event comes with the first token, and the last one counts the tokens.
        first = usage = None
        for line in response:
            event = line.decode().strip().removeprefix("data: ")
            if event.startswith("{"):
                first = first or time.perf_counter()
                usage = json.loads(event).get("usage") or usage
    finally:
        connection.close()

    if first is None or usage is None:
        raise ServerError("vLLM ended an answer before its first token")
    end = time.perf_counter()
    return TimedAnswer(first - start, end - start, usage["prompt_tokens"], usage["completion_tokens"])


@dataclass(frozen=True)
class CacheUse:
    """Blocks of the cache for keys and values."""

    blocks: int
    used: int
    tokens_a_block: int


def parse_cache_use(metrics: str) -> CacheUse:
    """Read how full the cache is from a page of vLLM's metrics.

    Raises:
        ServerError: the page does not say so.
    """
    blocks = re.search(r'^vllm:cache_config_info{.*\bnum_gpu_blocks="(\d+)"', metrics, re.MULTILINE)
    size = re.search(r'^vllm:cache_config_info{.*\bblock_size="(\d+)"', metrics, re.MULTILINE)
    usage = re.search(r"^vllm:kv_cache_usage_perc{.*} (\S+)$", metrics, re.MULTILINE)
    if blocks is None or size is None or usage is None:
        raise ServerError("vLLM's metrics do not tell how full its cache is")

    # vLLM tells the share, and never gives one of the blocks away.
    total = int(blocks[1])
    return CacheUse(total, round(float(usage[1]) * (total - 1)), int(size[1]))


class CacheWatch:
    """Looks at a server's cache again and again while a `with` block runs.

    Attributes:
        peak: the fullest cache that was seen.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.peak = CacheUse(0, 0, 0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(WATCH_SECONDS):
            page = read_page(self.server.address, "/metrics")
            if page is not None:
                self.peak = max(self.peak, parse_cache_use(page), key=lambda use: use.used)

    def __enter__(self) -> "CacheWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


@dataclass(frozen=True)
class LoadResult:
    """What a server did under one load."""

    seconds: float
    answers: Sequence[TimedAnswer]
    cache: CacheUse


def put_load(server: Server, pictures: Sequence[str], *, concurrency: int, num_new: int) -> LoadResult:
    """Ask about each picture, so many at a time, and measure."""
    with CacheWatch(server) as watch, ThreadPoolExecutor(concurrency) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda picture: ask(server, picture, num_new=num_new), pictures))
        seconds = time.perf_counter() - start
    return LoadResult(seconds, answers, watch.peak)
