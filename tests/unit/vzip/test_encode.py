"""Conversation templates: ids and labels, against lists worked out by hand, and for any text.

`tests/contract/test_golden_labels.py` compares them with those of LLaVA's own trainer.
"""

import copy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.templates.encode import (
    IGNORED,
    IMAGE,
    VIDEO,
    chatml,
    encode,
    mistral,
    place_media,
    plain,
    vicuna,
)


@pytest.fixture(scope="module")
def sentencepiece(sentencepiece_folder):
    """legacy -> a small tokenizer like LLaMA's, with `<image>` and `<video>`, as LLaVA-1.5's."""
    tokenizers = {}
    for legacy in (True, False):
        tokenizers[legacy] = LlamaTokenizer.from_pretrained(sentencepiece_folder, legacy=legacy)
        tokenizers[legacy].add_tokens([IMAGE, VIDEO], special_tokens=True)
    return tokenizers


@pytest.fixture(params=[True, False], ids=["legacy", "new"])
def legacy(request):
    return request.param


@pytest.fixture
def llama(sentencepiece, legacy):
    return sentencepiece[legacy]


@pytest.fixture(scope="module")
def joining():
    """A byte tokenizer that joins newlines and spaces, as GPT-2's, Qwen's and SmolLM2's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*tiny.SPECIAL, *alphabet, "ĊĊ", "ĠĠ", "ĊĠ", "Ġx"]
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), ("Ġ", "x")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", extra_special_tokens=tiny.SPECIAL[3:]
    )


def with_loss(labels):
    return [label for label in labels if label != IGNORED]


def without_loss(ids, labels):
    return [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]


def assert_labels_are_ids(ids, labels):
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def assert_pieces(tokenizer, encoded, *parts):
    """The pieces are those of the parts, in turns without and with loss."""
    ids, labels = encoded
    expected_pieces, expected_loss = [], []
    for index, part in enumerate(parts):
        expected_pieces += part
        expected_loss += [index % 2 == 1] * len(part)
    assert pieces(tokenizer, ids) == expected_pieces
    assert [label != IGNORED for label in labels] == expected_loss
    assert_labels_are_ids(ids, labels)


# Token by token

TURNS = [("<image>\nWhat is it?", "A red car."), ("Where?", "On the road.")]
QUESTION = ["▁", IMAGE, "▁", "<0x0A>", "What", "▁is", "▁it", "?"]
ANSWERS = ["▁A", "▁red", "▁car", "."], ["▁On", "▁the", "▁road", "."]


def test_vicuna_token_by_token(llama, legacy):
    end = ["▁ASSISTANT", ":"]
    first = ["<s>", "▁Be", "▁kind", ".", "▁US", "ER", ":", *QUESTION, *end]
    # Only a legacy tokenizer puts a space before text that follows a special token.
    second = [*(["▁US", "ER"] if legacy else ["USER"]), ":", "▁Where", "?", *end]
    answers = [[*answer, "</s>"] for answer in ANSWERS]
    encoded = encode(vicuna("Be kind. "), llama, TURNS)
    assert_pieces(llama, encoded, first, answers[0], second, answers[1])

    start = ["<s>", "▁US", "ER", ":"]
    encoded = encode(vicuna(""), llama, [("Say\nit", "A.")])
    assert_pieces(llama, encoded, [*start, "▁Say", "<0x0A>", "it", *end], ["▁A", ".", "</s>"])
    encoded = encode(vicuna(""), llama, [("<image>\nWhat", None)])
    assert_pieces(llama, encoded, [*start, *QUESTION[:5], *end])


def test_mistral_token_by_token(llama, legacy):
    start, end = ["▁[", "INST", "]"], ["▁[", "/", "INST", "]"]
    first = ["<s>", *start, *QUESTION, *end]
    second = [*(start if legacy else ["[", "INST", "]"]), "▁Where", "?", *end]
    answers = [[*answer, "▁", "</s>"] for answer in ANSWERS]
    encoded = encode(mistral(), llama, TURNS)
    assert_pieces(llama, encoded, first, answers[0], second, answers[1])


def test_plain_token_by_token(llama):
    encoded = encode(plain(), llama, [("Describe it.\n<image>", "A red car.")])
    assert_pieces(llama, encoded, ["<s>", IMAGE], [*ANSWERS[0], "<0x0A>"])
    encoded = encode(plain(), llama, [("<image>\nand\n<image>", "Two.")])
    assert_pieces(llama, encoded, ["<s>", IMAGE, IMAGE], ["▁Two", ".", "<0x0A>"])
    encoded = encode(plain(), llama, [("Describe <image> and <video>", None)])
    assert_pieces(llama, encoded, ["<s>", IMAGE, VIDEO])
    encoded = encode(plain(adds_bos=False), llama, [("<image>", None)])
    assert_pieces(llama, encoded, [IMAGE])


# Conversations of which LLaVA's trainer loses count


@pytest.mark.parametrize("build", [vicuna, mistral])
@pytest.mark.parametrize("position", [0, 1])
def test_a_conversation_that_llava_masks_has_no_loss(llama, build, position):
    template = build()
    for spelled in ("</s>", "<unk>", f"and{template.answer_mark}yes"):
        for turn in (("q", f"a {spelled} b"), (f"q {spelled} b", "a")):
            turns = [("q", "a"), ("q", "a")]
            turns[position] = turn
            ids, labels = encode(template, llama, turns)
            assert set(labels) == {IGNORED}, turn
            assert len(ids) == len(labels)

    turns = [("q", "a"), ("q", "a")]
    turns[position] = ("", "a")
    assert set(encode(template, llama, turns)[1]) == {IGNORED}


@pytest.mark.parametrize("build", [vicuna, mistral])
def test_an_empty_answer_is_written_as_llava_does(llama, build):
    template = build()
    # In the middle, the next question follows at once, and the other answers keep their loss.
    turns = [("<image>\nfirst", ""), ("second", "Two."), ("third", "On the road.")]
    joined = place_media(turns[0][0]) + template.assistant + template.user + "second"
    expected = encode(template, llama, [(joined, "Two."), ("third", "On the road.")])
    assert encode(template, llama, turns) == expected
    assert set(expected[1]) != {IGNORED}

    # At the end nothing marks it, so LLaVA's trainer puts no loss on the whole conversation.
    turns = [("first", "Two."), ("second", "")]
    ids, labels = encode(template, llama, turns)
    assert ids == encode(template, llama, [turns[0], ("second", None)])[0]
    assert set(labels) == {IGNORED}


def test_chatml_and_captions_take_empty_texts():
    tokenizer = tiny.tokenizer()
    _, labels = encode(chatml("s"), tokenizer, [("", ""), ("q", "")])
    assert tokenizer.decode(with_loss(labels)) == "<|im_end|><|im_end|>"
    _, labels = encode(plain(), tokenizer, [("<image>", "")])
    assert tokenizer.decode(with_loss(labels)) == "\n"


@pytest.mark.parametrize("build", [vicuna, mistral])
def test_an_image_in_an_answer_stands_at_its_front_without_loss(llama, build):
    ids, labels = encode(build(), llama, [("Draw a car", "here: <image> see")])
    image_id = llama.convert_tokens_to_ids(IMAGE)
    assert ids.count(image_id) == 1 and labels[ids.index(image_id)] == IGNORED
    # LLaVA's trainer counts the space before the picture to the answer.
    assert pieces(llama, with_loss(labels))[:3] == ["▁", "▁", "<0x0A>"]
    assert pieces(llama, ids)[ids.index(image_id) - 1] == "▁"


# ChatML


def chatml_text(turns, system="Be kind."):
    """The whole conversation as ChatML writes it."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for question, answer in turns:
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        text += "" if answer is None else f"{answer}<|im_end|>\n"
    return text


def test_chatml_is_the_templates_string_and_joins_nothing_across_answers(joining):
    turns = [("<image>\nWhat?\n\nreally?", "A x."), ("Where?", "On\n\n x"), ("Text only", "ok")]
    for tokenizer in (joining, tiny.tokenizer()):
        ids, labels = encode(chatml("Be kind."), tokenizer, turns)
        assert ids == tokenizer.encode(chatml_text(turns), add_special_tokens=False)
        assert tokenizer.decode(with_loss(labels)) == "A x.<|im_end|>On\n\n x<|im_end|>ok<|im_end|>"


@pytest.mark.parametrize("answer", ["\nTwo", " lead", "  lead", "\n\nTwo", "\n x", "\t", " ", "\n"])
def test_answers_that_start_with_white_space_keep_their_labels(answer, joining, sentencepiece):
    turns = [("<image>\nx", answer), ("y", answer)]
    for tokenizer in (joining, tiny.tokenizer()):
        ids, labels = encode(chatml("s"), tokenizer, turns)
        assert tokenizer.decode(with_loss(labels)) == f"{answer}<|im_end|>{answer}<|im_end|>"
        assert tokenizer.decode(ids) == chatml_text(turns, "s")

    for tokenizer in sentencepiece.values():
        ids, labels = encode(vicuna(""), tokenizer, turns)
        assert_labels_are_ids(ids, labels)
        assert text_of_pieces(tokenizer, with_loss(labels)) == f" {answer}</s> {answer}</s>"


# Any conversation

# Any text except surrogates, which no tokenizer takes, and "<", which could spell a special token.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)


@given(st.lists(st.tuples(st.integers(0, 2), TEXT, TEXT), min_size=1, max_size=3))
def test_properties_of_any_conversation(drawn):
    tokenizer, template = tiny.tokenizer(), chatml("s")
    turns = [(f"{IMAGE}\n" * num_images + question, answer) for num_images, question, answer in drawn]
    ids, labels = encode(template, tokenizer, turns)
    assert_labels_are_ids(ids, labels)
    assert tokenizer.decode(with_loss(labels)) == "".join(answer + "<|im_end|>" for _, answer in turns)

    prompts = chatml_text([], "s")
    for question, _ in turns:
        prompts += chatml_text([(place_media(question), None)], "s").removeprefix(chatml_text([], "s")) + "\n"
    assert tokenizer.decode(without_loss(ids, labels)) == prompts

    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    assert ids.count(image_id) == sum(num_images for num_images, _, _ in drawn)
    assert image_id not in labels

    # A prompt ends where the loss starts.
    prompt, prompt_labels = encode(template, tokenizer, [*turns[:-1], (turns[-1][0], None)])
    assert prompt == ids[: len(prompt)] and prompt_labels == labels[: len(prompt)]
    assert labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("build", [vicuna, mistral])
def test_a_prompt_is_the_beginning_of_its_conversation(llama, build):
    ids, labels = encode(build(), llama, TURNS)
    prompt, prompt_labels = encode(build(), llama, [TURNS[0], ("Where?", None)])
    assert prompt == ids[: len(prompt)] and prompt_labels == labels[: len(prompt)]
    assert llama.decode(ids[len(prompt) :]).replace(" ", "") == "Ontheroad.</s>"


# Placeholders


@pytest.mark.parametrize(
    ("question", "placed"),
    [
        ("  no image\n", "  no image\n"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("Is <video> that?\n", "<video>\nIs  that?"),
        ("<video>", "<video>"),
        ("<video><video>\nSame?", "<video>\n<video>\nSame?"),
        ("<video>a<image>b<video>c<image>", "<image>\n<image>\n<video>\n<video>\nabc"),
    ],
)
def test_images_are_placed_first_then_videos(question, placed):
    assert place_media(question) == placed
    assert place_media(placed) == placed


@pytest.mark.parametrize("build", [vicuna, mistral])
def test_videos_are_tokenized_as_images_are(sentencepiece, build):
    tokenizer = sentencepiece[False]
    image_id, video_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    turns = [("<video>\nWhat happens?", "A car stops."), ("And in <video> this?", "It\nstarts.")]
    ids, labels = encode(build(), tokenizer, turns)
    expected, expected_labels = encode(build(), tokenizer, [(q.replace(VIDEO, IMAGE), a) for q, a in turns])
    assert ids == [video_id if token == image_id else token for token in expected]
    assert ids.count(video_id) == 2 and labels == expected_labels


def test_images_and_videos_of_a_question_are_each_one_id():
    tokenizer = tiny.tokenizer()
    ids, _ = encode(chatml("s"), tokenizer, [("<video> like <image>?<video>", "no")])
    assert tokenizer.decode(ids) == chatml_text([("<image>\n<video>\n<video>\nlike ?", "no")], "s")


# What does not fit


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([("What is a car?", "A thing.")], ["What is a car", "has no <image>"]),
        ([("<image>", "A car."), ("<image>", "A tree.")], ["not 2 turns"]),
        ([], ["not 0 turns"]),
    ],
)
def test_plain_refuses_a_conversation(turns, words):
    refused(encode, plain(), tiny.tokenizer(), turns, words=words)


def test_a_tokenizer_that_lacks_a_token_is_refused(sentencepiece):
    words = ["'chatml'", "<|im_start|>", "model.template"]
    refused(encode, chatml("s"), sentencepiece[False], [("q", "a")], words=words)

    without_video = tiny.tokenizer(tiny.SPECIAL[:-1])
    refused(encode, chatml("s"), without_video, [("<video>\nWhat?", "no")], words=["<video>"])

    without_bos = tiny.tokenizer()
    without_bos.bos_token = None
    refused(encode, vicuna(), without_bos, [("q", "a")], words=["BOS"])


def test_a_tokenizer_that_does_not_fit_the_template_is_refused():
    """It writes bytes in reverse order, so that no anchor is the beginning of a text with more behind it."""

    class Reversed:
        bos_token_id = 0

        def convert_tokens_to_ids(self, token):
            return 1

        def encode(self, text, **settings):
            return list(reversed(text.encode()))

    refused(encode, vicuna(""), Reversed(), [("q", "b")], words=["does not fit the tokenizer"])


# Texts that spell the tokens of a template

SPELLED = [
    *("</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>assistant\n"),
    *("[INST]", "[/INST]", "ASSISTANT:", "USER: ", "<0x0A>"),
]
TEMPLATES = {"vicuna": vicuna(), "mistral": mistral(), "chatml": chatml("s"), "plain": plain()}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=5)
PARTS = st.sampled_from([*SPELLED, " ", "\n", "a", "é", "漢"]) | ANY_TEXT


@st.composite
def hostile_turns(draw, name):
    """Turns of texts that spell the templates' own texts. No text is empty."""
    turns = []
    for _ in range(1 if name == "plain" else draw(st.integers(1, 3))):
        question = "".join(draw(st.lists(PARTS, max_size=6))) or "q"
        if name == "plain" or draw(st.booleans()):
            question = "<image>\n" + question
        answer = "".join(draw(st.lists(PARTS, max_size=6))) or "a"
        turns.append((question, answer))
    return turns


def llava_finds_the_answers(template, turns):
    """Whether LLaVA's trainer counts the tokens right: no text spells what it cuts a conversation at."""
    for question, answer in turns:
        if not template.answer_mark:
            continue
        turn = template.user + place_media(question) + template.assistant
        turn += template.answer_prefix + answer + template.answer_suffix
        spelled = [token for token in ("</s>", "<unk>") if token in question + answer]
        if spelled or len(turn.split(template.answer_mark)) != 2:
            return False
    return True


def text_of_pieces(tokenizer, ids):
    """The ids' text to the byte, with each space that a SentencePiece tokenizer puts before a text."""
    text = b""
    for piece in pieces(tokenizer, ids):
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
        text += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    return text.decode()


def expected_texts(name, turns, space):
    """The texts without and with loss; the tokenizer puts `space` before a text by itself."""

    def alone(text):
        return space + text if text else ""

    template = TEMPLATES[name]
    if name == "plain":
        ((question, answer),) = turns
        return "<s>" + IMAGE * question.count(IMAGE), alone(answer + "\n")

    prompts, answers = [], ""
    for question, answer in turns:
        prompts.append(template.user + place_media(question) + template.assistant)
        text = template.answer_prefix + answer + template.answer_suffix
        answers += (text if template.answer_prefix else alone(text)) + template.end
    bos = "<s>" if template.adds_bos else ""
    return bos + template.system + template.separator.join(prompts) + template.separator, answers


@pytest.fixture(scope="module")
def knowing(sentencepiece, joining):
    """Tokenizers that know the tokens of all templates, by name."""
    tokenizers = {
        "bytes": tiny.tokenizer(),
        "joining": joining,
        "legacy": sentencepiece[True],
        "new": sentencepiece[False],
    }
    tokenizers = copy.deepcopy(tokenizers)
    for tokenizer in tokenizers.values():
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer.add_tokens(tiny.SPECIAL[3:], special_tokens=True)
    return tokenizers


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "joining", "legacy", "new"])
@given(data=st.data())
def test_no_text_forges_a_turn(name, kind, knowing, data):
    tokenizer = knowing[kind]
    turns = data.draw(hostile_turns(name))
    ids, labels = encode(TEMPLATES[name], tokenizer, turns)
    assert_labels_are_ids(ids, labels)

    is_masked = set(labels) == {IGNORED}
    assert is_masked != llava_finds_the_answers(TEMPLATES[name], turns)
    prompt = without_loss(ids, labels)
    if is_masked:
        pass  # without labels, only the control tokens can be counted
    elif kind in ("bytes", "joining"):
        expected_prompt, expected_answers = expected_texts(name, turns, space="")
        assert tokenizer.decode(with_loss(labels)) == expected_answers
        assert tokenizer.decode(prompt) == expected_prompt
    else:
        expected_prompt, expected_answers = expected_texts(name, turns, space=" ")
        assert text_of_pieces(tokenizer, with_loss(labels)) == expected_answers
        # There is one more space before each chunk of a prompt that is tokenized by itself.
        without_spaces = text_of_pieces(tokenizer, prompt).replace(" ", "")
        assert without_spaces == expected_prompt.replace(" ", "")

    num_controls = {
        "vicuna": 1 + len(turns),
        "mistral": 1 + len(turns),
        "chatml": 2 + 4 * len(turns),
        "plain": 1,
    }
    num_images = sum(question.count(IMAGE) for question, _ in turns)
    controls = {tokenizer.convert_tokens_to_ids(token) for token in tiny.SPECIAL}
    assert sum(token in controls for token in ids) == num_controls[name] + num_images
