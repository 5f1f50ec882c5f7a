"""vLLM answers as `vzip.load` does, token by token, for every family that it serves."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.exceptions import VLLMValidationError

from tests.helpers import tiny
from tests.serve.models import assert_same_answers, prompt, reference, save_export
from vzip.families.llava import Llava
from vzip.integrations.vllm.model import VZipForConditionalGeneration
from vzip.runs.meta import WEIGHTS

IMAGE = tiny.SPECIAL.index("<image>")
ONE, TWO = tiny.picture(1, 60, 150), tiny.picture(2, 80, 50)
CLIP_1, CLIP_2 = tiny.video(1, 4), tiny.video(2, 4)

REQUESTS_OF_IMAGES = [
    prompt("<image>what is it?", images=[ONE]),
    prompt("<image> and <image>: which is larger?", images=[ONE, TWO]),
    prompt("<image>what is it?", images=[TWO]),
    prompt("a question about nothing at all"),
]
REQUESTS = {
    "clip": [
        *REQUESTS_OF_IMAGES,
        prompt("<image>what is it?", images=[ONE], budget=11),
        prompt("<image>what is it?", images=[TWO], budget=6),
        prompt("<image> and <image>: which is larger?", images=[ONE, TWO], budget=11),
        prompt("<image> and <image>: are they the same?", images=[TWO, TWO]),
    ],
    "dinov2": REQUESTS_OF_IMAGES,
    "next": REQUESTS_OF_IMAGES,
    "mini-gemini": REQUESTS_OF_IMAGES,
    "onevision": [
        prompt("<image>what is it?", images=[ONE]),
        prompt("<video>what happens?", videos=[CLIP_1]),
        prompt("<video> or <video>?", videos=[CLIP_1, CLIP_2]),
        prompt("<image> in <video>?", images=[TWO], videos=[CLIP_2]),
    ],
}
"""What each kind of model is asked, all in one batch."""


LAYOUTS = {
    "clip": {"vision_tower.": "vision_tower.vision_model."},
    "next": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
    },
}
"""Prefixes in checkpoints of transformers 4, and those of the model itself. The others have vzip's own."""


def rename_weights(folder, prefixes):
    """Write the base model's weights anew, under the names of another layout."""
    (shard,) = folder.glob("model-*.safetensors")
    renamed = {}
    for name, tensor in load_file(shard).items():
        before = next((each for each in prefixes if name.startswith(each)), "")
        renamed[prefixes.get(before, "") + name.removeprefix(before)] = tensor

    # A link to the base model's file.
    shard.unlink()
    save_file(renamed, shard, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """The export of each kind, and what transformers answers. No engine has started before."""
    folders = {}
    for kind, requests in REQUESTS.items():
        budgets = [(4, 2), (8, 3)] if kind == "clip" else [(4, 2)]
        folder = save_export(tmp_path_factory.mktemp(kind), kind, *budgets)
        folders[kind] = folder, [reference(folder, request) for request in requests]
        if kind in LAYOUTS:
            rename_weights(folder, LAYOUTS[kind])
    return folders


def test_llava_with_mixed_budgets_repeated_pictures_caches_and_chunks(engine, exports):
    folder, expected = exports["clip"]
    assert [ids.count(IMAGE) for ids, *_ in expected] == [6, 12, 6, 0, 11, 6, 22, 12]

    # Chunks of fewer tokens than the prompts have, so that these are cut.
    llm = engine(folder, max_num_batched_tokens=48, enable_chunked_prefill=True)
    assert_same_answers(llm, REQUESTS["clip"], expected)

    with pytest.raises(ValueError, match="budget=7 was not tuned; this model serves: 6, 11"):
        llm.generate([prompt("<image>", images=[ONE], budget=7)], use_tqdm=False)
    assert_same_answers(llm, REQUESTS["clip"][:2], expected[:2])


def without_caches(llm):
    """Make an engine forget all pictures and prompts."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    return llm


def test_a_wrong_plugin_is_noticed(engine, exports, monkeypatch):
    folder, expected = exports["clip"]
    llm = engine(folder)
    two, answer = REQUESTS["clip"][1], expected[1]
    assert_same_answers(llm, [two], [answer])

    # One that swaps pictures in a batch.
    embed = VZipForConditionalGeneration.embed_multimodal
    with monkeypatch.context() as patch:
        patch.setattr(
            VZipForConditionalGeneration,
            "embed_multimodal",
            lambda self, **fields: embed(self, **fields)[::-1],
        )
        with pytest.raises(AssertionError):
            assert_same_answers(without_caches(llm), [two], [answer])
    assert_same_answers(without_caches(llm), [two], [answer])

    # One that writes placeholders for all tokens.
    monkeypatch.setattr(Llava, "num_processed_tokens", lambda *arguments: 16)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        assert_same_answers(without_caches(llm), [two], [answer])


def test_the_tower_is_that_of_transformers_and_the_projector_is_exact(engine, exports):
    folder, _ = exports["clip"]
    projector = load_file(folder / WEIGHTS)

    def check(network):
        queries = [each for name, each in network.family.tower.named_modules() if name.endswith("q_proj")]
        assert len(queries) == tiny.LAYERS and all(type(each) is nn.Linear for each in queries)
        assert network.family.language_model.dtype == torch.bfloat16
        for name, parameter in network.family.projector.named_parameters():
            right = projector[f"{network.family.projector_name}.{name}"]
            torch.testing.assert_close(parameter.data, right, rtol=0, atol=0)

    # Beside a language model in bf16, which would round the projector too.
    engine(folder, dtype="bfloat16").apply_model(check)


@pytest.mark.parametrize("kind", ["dinov2", "next", "mini-gemini"])
def test_images_of_other_families(engine, exports, kind):
    folder, expected = exports[kind]
    assert_same_answers(engine(folder), REQUESTS[kind], expected)


def test_images_and_videos_of_onevision(engine, exports):
    folder, expected = exports["onevision"]
    llm = engine(folder)
    assert_same_answers(llm, REQUESTS["onevision"], expected)

    # Beside another image, an image has other tokens in transformers: refused instead of different.
    with pytest.raises(VLLMValidationError, match="At most 1 image"):
        llm.generate([prompt("<image><image>", images=[ONE, TWO])], use_tqdm=False)
