"""The benchmark of serving: its load, its models and its table. tests/serve runs it against vLLM."""

import base64
import io
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from scripts.serve.bench import Load, measure
from scripts.serve.load import CacheUse, LoadResult, TimedAnswer, ask, noise_picture, parse_cache_use
from scripts.serve.models import all_tokens, reduced_by, save_random_model, served_shape
from scripts.serve.server import ServerError
from scripts.serve.table import markdown, summarize
from tests.helpers.chat_server import METRICS, start_chat_server
from vzip.families.llava import Llava


@pytest.fixture
def chat_server():
    listener = start_chat_server()
    address = f"http://127.0.0.1:{listener.server_port}"
    yield SimpleNamespace(address=address, model="it", questions=listener.questions)
    listener.shutdown()


@pytest.mark.slow
def test_both_servers_get_the_same_load_in_turns(chat_server):
    servers = {"full": chat_server, "reduced": chat_server}
    results = measure(servers, Load({1: 2, 4: 5}, num_new=3))
    assert list(results) == [1, 4]
    for concurrency, num_requests in ((1, 2), (4, 5)):
        for turns in results[concurrency].values():
            assert [len(turn.answers) for turn in turns] == [num_requests, num_requests]

    # Two to warm up each server, then four turns. No picture comes twice.
    urls = [each["messages"][0]["content"][0]["image_url"]["url"] for each in chat_server.questions]
    assert len(urls) == len(set(urls)) == 2 * 2 + 4 * (2 + 5)

    answer = results[1]["full"][0].answers[0]
    assert (answer.prompt_tokens, answer.new_tokens) == (99, 3)
    assert 0 < answer.first_token_s <= answer.whole_s


def test_a_refused_request_ends_the_measurement(chat_server):
    chat_server.model = "broken"
    with pytest.raises(ServerError, match=r"400: .*budget=7 was not tuned"):
        ask(chat_server, "", num_new=3)


def test_the_cache_is_read_from_the_metrics():
    assert parse_cache_use(METRICS) == CacheUse(blocks=101, used=25, tokens_a_block=32)
    with pytest.raises(ServerError, match="how full"):
        parse_cache_use("nothing")


def test_pictures_are_pictures():
    picture = Image.open(io.BytesIO(base64.b64decode(noise_picture(1))))
    assert picture.size == (336, 336)
    assert noise_picture(1) == noise_picture(1) != noise_picture(2)


def test_the_table_says_what_is_better_and_what_is_worse():
    def turn(seconds, first, whole, used):
        answers = [TimedAnswer(first, whole, 99, 3)] * 4
        return LoadResult(seconds, answers, CacheUse(101, used, 128))

    full, reduced = [turn(4, 1, 2, 20)] * 2, [turn(2, 0.25, 2.25, 5)] * 2
    rows = summarize({8: {"full": full, "reduced": reduced}})
    assert rows[0]["ratio"] == {
        "requests_a_second": 2,
        "first_token_ms": 4,
        "token_ms": 0.5,
        "peak_blocks": 4,
    }
    table = markdown(rows)
    assert "| 8 | requests a second | 1.00 | 2.00 | 2.00 |" in table
    assert "| 8 | time a token after it, ms | 500.0 | 1,000.0 | 0.50 |" in table
    assert "101 blocks of 128 (full)" in table

    # A cache that was never seen in use has no ratio.
    unseen = [turn(2, 1, 2, 0)]
    assert summarize({1: {"full": unseen, "reduced": unseen}})[0]["ratio"]["peak_blocks"] is None


def test_a_random_model_is_complete_but_for_its_weights(tmp_path):
    shape = served_shape("tiny")
    save_random_model(shape, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (512, 8)
    assert Llava(SimpleNamespace(config=config)).num_patches == 576

    processor = AutoProcessor.from_pretrained(tmp_path)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    text = processor.apply_chat_template([message])
    ids = processor(images=Image.new("RGB", (50, 70)), text=text).input_ids[0]
    assert ids.count(config.image_token_id) == 576
    assert len(processor.tokenizer) == config.text_config.vocab_size


def test_settings_differ_in_the_reducer_alone():
    assert '"dominant": 54' in reduced_by(served_shape("tiny"))[1]
    card = {
        "format": 1,
        "budget": 8,
        "reducer": {"name": "visionzip"},
        "other_budgets": {"4": {}},
        "dtype": "x",
    }
    assert all_tokens(card)[1] == (
        '{"vzip": {"dtype": "x", "format": 1, "reducer": {"name": "identity"}, "other_budgets": {}}}'
    )
