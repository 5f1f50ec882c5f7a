"""vLLM answers as `vzip.load` does, token by token, for every family that it serves."""

import pytest
from vllm.exceptions import VLLMValidationError

from tests.helpers import tiny
from tests.serve.models import assert_same_answers, prompt, reference, save_export

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


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """The export of each kind, and what transformers answers. No engine has started before."""
    folders = {}
    for kind, requests in REQUESTS.items():
        budgets = [(4, 2), (8, 3)] if kind == "clip" else [(4, 2)]
        folder = save_export(tmp_path_factory.mktemp(kind), kind, *budgets)
        folders[kind] = folder, [reference(folder, request) for request in requests]
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
