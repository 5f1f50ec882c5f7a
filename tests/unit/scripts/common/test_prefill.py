"""Prefill and decoding: what is timed is what the model generates."""

import pytest
import torch

import vzip
from scripts.bench.prefill import noise_inputs
from scripts.common.prefill import Prefill
from tests.helpers import tiny
from vzip.families import family_of
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip

CASES = [
    ("clip", Identity()),
    ("clip", VisionZip(budget=6)),
    ("next", Identity()),
    ("next", VisionZip(budget=20, tiles=5)),
]

BATCH, LAYERS, HEADS, HEAD_WIDTH = 2, 2, 2, 12


@pytest.mark.parametrize(("kind", "reducer"), CASES, ids=str)
def test_what_is_timed_is_what_the_model_generates(kind, reducer):
    torch.manual_seed(0)
    family = family_of(tiny.llava(kind))
    case = Prefill(family, reducer, noise_inputs(family, reducer, batch=BATCH, num_text=7))

    whole, language = case.whole(), case.language()
    torch.testing.assert_close(whole.logits, language.logits)

    with vzip.attach(family.model, reducer=reducer):
        generated = family.model.generate(
            **case.inputs,
            attention_mask=torch.ones_like(case.inputs["input_ids"]),
            do_sample=False,
            max_new_tokens=5,
            min_new_tokens=5,
            pad_token_id=0,
        )

    # Twice from the same output: its cache is the same afterwards.
    for prefilled in (whole, language, language):
        assert torch.equal(case.decode(prefilled, num_tokens=4), generated[:, -4:])

    num_tokens = case.inputs["input_ids"].shape[1]
    num_values = BATCH * num_tokens * LAYERS * 2 * HEADS * HEAD_WIDTH  # keys and values
    size = case.size(language)
    assert size["kv_bytes"] == 4 * num_values
    assert size["num_text_tokens"] == 7 and size["num_visual_tokens"] == family.num_image_tokens(reducer)
