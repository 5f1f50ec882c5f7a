"""Ids and labels of 120 conversations of every kind, against those of LLaVA's own trainer.

`cases.json.gz` has the conversations, and what haotian-liu/LLaVA (commit c121f043) makes of them with
the templates vicuna_v1, mistral_instruct and plain. -200 stands for a picture. The tokenizer is the
one that it used, Mistral's (Apache 2.0), without the pieces that none of the texts spells.

A conversation is equal, or of a kind in the table of docs/fidelity.md.
"""

import gzip
import json
import lzma

import pytest

from data.conversations import parse_conversation
from tests.conftest import GOLDEN, ROOT
from vzip import UserError
from vzip.checkpoints.original.llava import load_tokenizer
from vzip.templates.encode import IGNORED, IMAGE, encode, mistral, plain, vicuna

LABELS = GOLDEN / "labels"
CASES = json.loads(gzip.decompress((LABELS / "cases.json.gz").read_bytes()))
TEMPLATES = {"vicuna_v1": vicuna(), "mistral_instruct": mistral(), "plain": plain()}

NUM_TOKENS = 2048
"""LLaVA's longest text."""
PICTURE = -200
SPECIAL = ("<s>", "</s>", "<unk>")

PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden-labels")
    model = lzma.decompress((LABELS / "tokenizer.model.xz").read_bytes())
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "vocab_size": 32000}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    return load_tokenizer(str(folder))


def ours(template, tokenizer, entry):
    """(ids, labels) as the recipe trains on them; None if it leaves the conversation out."""
    try:
        conversation = parse_conversation(entry)
        ids, labels = encode(template, tokenizer, conversation.turns)
    except (ValueError, UserError):
        return None

    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    ids = [PICTURE if token == image_id else token for token in ids]
    return ids[:NUM_TOKENS], labels[:NUM_TOKENS]


def llavas(case):
    """(ids, labels) as LLaVA trains on them; None if it stops with an error."""
    if "error" in case:
        return None

    # The model takes the loss off pictures later, when it puts their features in.
    return case["ids"], [IGNORED if label == PICTURE else label for label in case["labels"]]


def deviations(entry):
    """The kinds of the table that a conversation is of, by the title of their rows."""
    texts = [message["value"] for message in entry["conversations"]]
    num_placeholders = sum(text.count(IMAGE) for text in texts)
    num_images = len(entry["image"]) if isinstance(entry.get("image"), list) else int("image" in entry)

    kinds = set()
    if any(token in text for token in SPECIAL for text in texts):
        kinds.add("a text spells a special token")
    if num_images > 1:
        kinds.add("several pictures in one text")
    if num_placeholders != num_images:
        kinds.add("more or fewer placeholders than pictures")
    if "" in texts:
        kinds.add("an empty question")
    return kinds


def has_loss(encoded):
    return encoded is not None and set(encoded[1]) != {IGNORED}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_labels_are_those_of_llava(name, tokenizer):
    num_equal = 0
    unexplained = []
    for entry in CASES["conversations"]:
        expected = llavas(CASES["llava"][name][entry["id"]])
        encoded = ours(TEMPLATES[name], tokenizer, entry)
        if encoded == expected:
            num_equal += 1
        elif not deviations(entry):
            unexplained.append(entry["id"])

    assert unexplained == []
    assert num_equal >= {"vicuna_v1": 107, "mistral_instruct": 107, "plain": 117}[name]


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral_instruct"])
def test_what_llava_masks_has_no_loss_here(name, tokenizer):
    masked = [id for id, case in CASES["llava"][name].items() if case.get("mismatch")]
    assert len(masked) > 4
    for entry in CASES["conversations"]:
        if entry["id"] in masked:
            assert not has_loss(ours(TEMPLATES[name], tokenizer, entry)), entry["id"]


def test_the_table_names_every_deviation():
    kinds = set()
    for entry in CASES["conversations"]:
        kinds |= deviations(entry)

    assert len(kinds) == 4
    titles = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")]
    assert kinds <= set(titles)
