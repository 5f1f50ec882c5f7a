"""Conversation templates: token ids and labels, against lists worked out by hand and LLaVA's own rule."""

import copy
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tests.helpers import tiny
from vzip import UserError
from vzip.templates.encode import (
    IGNORED,
    IMAGE,
    VICUNA_SYSTEM,
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
    """legacy -> a small tokenizer of LLaMA's kind, `<image>` and `<video>`, as LLaVA-1.5's and Video-LLaVA's."""

    def build(legacy):
        tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_folder, legacy=legacy)
        tokenizer.add_tokens([IMAGE, VIDEO], special_tokens=True)
        return tokenizer

    tokenizers = {legacy: build(legacy) for legacy in (True, False)}
    return tokenizers.__getitem__


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


def labelled(labels):
    return [label for label in labels if label != IGNORED]


def pieces(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


PROMPT_END = ["▁ASSISTANT", ":"]


@pytest.mark.parametrize("legacy", [True, False])
def test_vicuna_token_by_token(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    turns = [("<image>\nWhat is it?", "A red car."), ("Where?", "On the road.")]
    ids, labels = encode(vicuna("Be kind. "), tokenizer, turns)
    first = [
        "<s>",
        "▁Be",
        "▁kind",
        ".",
        "▁US",
        "ER",
        ":",
        "▁",
        IMAGE,
        "▁",
        "<0x0A>",
        "What",
        "▁is",
        "▁it",
        "?",
        *PROMPT_END,
    ]
    answer, answer_2 = ["▁A", "▁red", "▁car", ".", "</s>"], ["▁On", "▁the", "▁road", ".", "</s>"]
    # Only a legacy tokenizer puts a space before text that follows a special token.
    second = [*(["▁US", "ER"] if legacy else ["USER"]), ":", "▁Where", "?", *PROMPT_END]
    assert pieces(tokenizer, ids) == first + answer + second + answer_2
    carries_loss = [False] * len(first) + [True] * 5 + [False] * len(second) + [True] * 5
    assert [label != IGNORED for label in labels] == carries_loss
    assert [label for label, loss in zip(labels, carries_loss, strict=True) if loss] == labelled(labels)
    assert pieces(tokenizer, labelled(labels)) == answer + answer_2


@pytest.mark.parametrize("legacy", [True, False])
def test_vicuna_without_system_prompt_and_image(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    ids, labels = encode(vicuna(""), tokenizer, [("Say\nit", "A.")])
    assert pieces(tokenizer, ids) == [
        "<s>",
        "▁US",
        "ER",
        ":",
        "▁Say",
        "<0x0A>",
        "it",
        *PROMPT_END,
        "▁A",
        ".",
        "</s>",
    ]
    assert pieces(tokenizer, labelled(labels)) == ["▁A", ".", "</s>"]
    ids, _ = encode(vicuna(""), tokenizer, [("<image>\nWhat", None)])
    assert pieces(tokenizer, ids) == ["<s>", "▁US", "ER", ":", "▁", IMAGE, "▁", "<0x0A>", "What", *PROMPT_END]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_default_system_prompt_is_vicunas(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    ids, _ = encode(vicuna(), tokenizer, [("<image>\nHi", None)])
    assert ids[: ids.index(tokenizer.convert_tokens_to_ids(IMAGE))] == llava_image_tokens(
        VICUNA_SYSTEM + "USER: ", tokenizer
    )
    assert VICUNA_SYSTEM.startswith(
        "A chat between a curious user and an artificial intelligence assistant. The"
    )


def llava_image_tokens(prompt, tokenizer):
    """LLaVA's tokenizer_image_token: BOS, and every chunk between images by itself."""
    ids = [tokenizer.bos_token_id]
    for index, chunk in enumerate(prompt.split(IMAGE)):
        ids += [tokenizer.convert_tokens_to_ids(IMAGE)] if index else []
        ids += tokenizer.encode(chunk, add_special_tokens=False)
    return ids


def llava_question(question):
    """LLaVA's preprocess_multimodal."""
    return (IMAGE + "\n" + question.replace(IMAGE, "").strip()).strip() if IMAGE in question else question


def llava_preprocess(tokenizer, turns, *, system="", legacy=False):
    """LLaVA's preprocess_v1: tokenize the whole prompt; find each round's answer by counting its tokens."""
    prompt = system
    for question, answer in turns:
        prompt += f"USER: {llava_question(question)} ASSISTANT: {answer}</s>"
    ids = llava_image_tokens(prompt, tokenizer)
    labels = [IGNORED] * len(ids)
    position = 1  # after BOS
    for index, text in enumerate(prompt.split("</s>")[:-1]):
        question, _ = text.split(" ASSISTANT: ")
        # Each round is counted with a BOS, which stands for its </s>; in place, a later round has no leading space.
        joined = 1 if index and not legacy else 0
        length = len(llava_image_tokens(text, tokenizer)) - joined
        skipped = len(llava_image_tokens(question + " ASSISTANT: ", tokenizer)) - 2 - joined
        labels[position + skipped : position + length] = ids[position + skipped : position + length]
        position += length
    assert position == len(ids)
    return ids, labels


CONVERSATIONS = [
    [("<image>\nWhat is it?", "A red car.")],
    [("What is it?\n<image>", "Ein rotes Auto, größer als 3 m.")],
    [("<image>\nWhat is it?", "A red car."), ("Where?", "On the road."), ("Sure?\nReally?", "Yes!")],
    [("What is it?", "A red car."), ("And this?\n<image>", "Two\nlines.")],
    [("Hello", "Hi"), ("  spaces  inside ", "42 %")],
    [("<image>\n日本語?", "はい。🙂"), ("Count: 1, 2", "3\n4\n")],
    [("<image>\nList", "\nTwo"), ("again", " lead"), ("and", "  two")],
    [("<image>\nBox?", "[0.1, 0.25, 0.9, 1.0]"), ("Sign?", "(a) :: b"), ("Word?", "ASSISTANT")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("system", ["", VICUNA_SYSTEM])
@pytest.mark.parametrize("legacy", [True, False])
def test_vicuna_is_llavas_preprocessing(sentencepiece, turns, system, legacy):
    tokenizer = sentencepiece(legacy)
    expected = llava_preprocess(tokenizer, turns, system=system, legacy=legacy)
    assert encode(vicuna(system), tokenizer, turns) == expected


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.text("ab Z19.,:?!\n-é漢", min_size=1).filter(str.strip),
            st.text("ab Z19.,:?!\n-é漢", min_size=1).filter(str.strip),
        ),
        min_size=1,
        max_size=3,
    ),
    image_at=st.integers(0, 3),
)
def test_vicuna_is_llavas_preprocessing_for_any_text(sentencepiece, turns, image_at):
    tokenizer = sentencepiece(False)
    turns = [(f"{IMAGE}\n{q}" if index == image_at else q, a) for index, (q, a) in enumerate(turns)]
    assert encode(vicuna(""), tokenizer, turns) == llava_preprocess(tokenizer, turns)


def test_a_question_that_is_only_an_image_is_as_in_llava(sentencepiece):
    tokenizer = sentencepiece(False)
    turns = [("<image>\n", "A red car.")]
    assert encode(vicuna(""), tokenizer, turns) == llava_preprocess(tokenizer, turns)


def chatml_text(turns, system="Be kind."):
    """The whole conversation as ChatML writes it."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for question, answer in turns:
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        text += "" if answer is None else f"{answer}<|im_end|>\n"
    return text


def test_chatml_is_the_templates_string():
    tokenizer = tiny.tokenizer()
    turns = [("<image>\nWhat is it?", "A red car."), ("Where?", " On the\nroad."), ("Text only", "ok")]
    ids, labels = encode(chatml("Be kind."), tokenizer, turns)
    assert ids == tokenizer.encode(chatml_text(turns), add_special_tokens=False)
    ends = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert [labels[i] != IGNORED for i in ends] == [False, False, True, False, True, False, True]
    assert tokenizer.decode(labelled(labels)) == "A red car.<|im_end|> On the\nroad.<|im_end|>ok<|im_end|>"
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for end in ends:
        assert ids[end + 1 : end + 2] == newline and labels[end + 1] == IGNORED


def test_chatml_joins_nothing_across_answers(joining):
    turns = [("<image>\nWhat?\n\nreally?", "A x."), ("Where?", "On\n\n x")]
    ids, labels = encode(chatml("Be kind."), joining, turns)
    assert ids == joining.encode(chatml_text(turns), add_special_tokens=False)
    assert joining.decode(labelled(labels)) == "A x.<|im_end|>On\n\n x<|im_end|>"


@pytest.mark.parametrize("answer", ["\nTwo", " lead", "  lead", "\n\nTwo", "\n x", "\t", " ", "\n"])
@pytest.mark.parametrize("kind", ["bytes", "joining"])
def test_answers_that_start_with_white_space_keep_their_labels(answer, kind, joining):
    tokenizer = joining if kind == "joining" else tiny.tokenizer()
    turns = [("<image>\nx", answer), ("y", answer)]
    ids, labels = encode(chatml("s"), tokenizer, turns)
    assert tokenizer.decode(labelled(labels)) == f"{answer}<|im_end|>{answer}<|im_end|>"
    assert tokenizer.decode(ids) == chatml_text(turns, "s")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("answer", ["\nTwo", " lead", "  lead", "\n\nTwo", "\n x"])
def test_vicuna_answers_that_start_with_white_space_keep_their_labels(sentencepiece, legacy, answer):
    tokenizer = sentencepiece(legacy)
    ids, labels = encode(vicuna(""), tokenizer, [("<image>\nx", answer), ("y", answer)])
    text = "".join(pieces(tokenizer, labelled(labels))).replace("<0x0A>", "\n").replace("▁", " ")
    assert text == f" {answer}</s> {answer}</s>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("legacy", [True, False])
def test_plain_token_by_token(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    ids, labels = encode(plain(), tokenizer, [("Describe it.\n<image>", "A red car.")])
    assert pieces(tokenizer, ids) == ["<s>", IMAGE, "▁A", "▁red", "▁car", ".", "<0x0A>"]
    assert labels == [IGNORED] * 2 + ids[2:]
    ids, labels = encode(plain(), tokenizer, [("<image>\nand\n<image>", "Two.")])
    assert pieces(tokenizer, ids) == ["<s>", IMAGE, IMAGE, "▁Two", ".", "<0x0A>"]
    assert pieces(tokenizer, labelled(labels)) == ["▁Two", ".", "<0x0A>"]


def llava_preprocess_plain(tokenizer, caption):
    """LLaVA's preprocess_plain."""
    ids = llava_image_tokens(f"{IMAGE}{caption}\n", tokenizer)
    skipped = len(llava_image_tokens(IMAGE, tokenizer))
    return ids, [IGNORED] * skipped + ids[skipped:]


@settings(max_examples=30, deadline=None)
@given(caption=st.text("ab Z19.,:?!\n-é漢"), legacy=st.booleans())
def test_plain_is_llavas_preprocessing_for_any_caption(sentencepiece, caption, legacy):
    tokenizer = sentencepiece(legacy)
    assert encode(plain(), tokenizer, [("What is it?\n<image>", caption)]) == llava_preprocess_plain(
        tokenizer, caption
    )


def test_a_plain_prompt_is_the_picture_alone(sentencepiece):
    tokenizer = sentencepiece(False)
    ids, labels = encode(plain(), tokenizer, [("Describe <image> and <video>", None)])
    assert pieces(tokenizer, ids) == ["<s>", IMAGE, VIDEO] and labels == [IGNORED] * 3
    assert encode(plain(adds_bos=False), tokenizer, [("<image>", None)])[0] == ids[1:2]


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([("What is a car?", "A thing.")], "What is a car.*has no <image>"),
        ([("<image>", "A car."), ("<image>", "A tree.")], "not 2 turns"),
        ([], "not 0 turns"),
    ],
)
def test_plain_refuses_what_is_no_caption(turns, fault):
    with pytest.raises(UserError, match=fault):
        encode(plain(), tiny.tokenizer(), turns)


def test_a_template_whose_tokens_the_tokenizer_does_not_know_is_refused(sentencepiece):
    with pytest.raises(UserError, match=r"'chatml'.*<\|im_start\|>.*model\.template"):
        encode(chatml("s"), sentencepiece(False), [("q", "a")])
    without_bos = tiny.tokenizer()
    without_bos.bos_token = None
    with pytest.raises(UserError, match="BOS"):
        encode(vicuna(), without_bos, [("q", "a")])


# Any text but surrogates, which no tokenizer takes, and "<", which could spell a special token.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)


@st.composite
def conversations(draw):
    questions = draw(st.lists(TEXT, min_size=1, max_size=3))
    images = [draw(st.integers(0, 2)) for _ in questions]
    return [(f"{IMAGE}\n" * count + q, draw(TEXT)) for q, count in zip(questions, images, strict=True)]


@settings(max_examples=50, deadline=None)
@given(turns=conversations())
def test_properties_of_any_conversation(turns):
    tokenizer = tiny.tokenizer()
    template = chatml("s")
    ids, labels = encode(template, tokenizer, turns)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert tokenizer.decode(labelled(labels)) == "".join(answer + "<|im_end|>" for _, answer in turns)
    rest = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    questions = [(place_media(question), None) for question, _ in turns]
    assert tokenizer.decode(rest) == "".join(
        chatml_text([turn], "s").removeprefix("" if index == 0 else chatml_text([], "s")) + "\n"
        for index, turn in enumerate(questions)
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    assert ids.count(image_id) == sum(question.count(IMAGE) for question, _ in turns)
    assert image_id not in labels

    prompt, nothing = encode(template, tokenizer, [*turns[:-1], (turns[-1][0], None)])
    assert prompt == ids[: len(prompt)]
    assert nothing == labels[: len(prompt)]
    assert labels[len(prompt)] != IGNORED  # and the loss starts with the very next token


@pytest.mark.parametrize("legacy", [True, False])
def test_a_vicuna_prompt_is_a_prefix_of_its_row(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    turns = [("<image>\nWhat is it?", "A red car."), ("Where?", "On the road.")]
    ids, labels = encode(vicuna(), tokenizer, turns)
    prompt, nothing = encode(vicuna(), tokenizer, [turns[0], ("Where?", None)])
    assert prompt == ids[: len(prompt)] and nothing == labels[: len(prompt)]
    assert tokenizer.decode(ids[len(prompt) :]) == "On the road.</s>"


@pytest.mark.parametrize(
    ("question", "placed"),
    [
        ("no image", "no image"),
        ("  no image\n", "  no image\n"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("Is <image> that?", "<image>\nIs  that?"),
        ("<image> and\n<image>", "<image>\n<image>\nand"),
        ("<video>", "<video>"),
        ("<video>\nWhat?", "<video>\nWhat?"),
        ("Is <video> that?\n", "<video>\nIs  that?"),
        ("<video><video>\nSame?", "<video>\n<video>\nSame?"),
        ("<video> like <image>?", "<image>\n<video>\nlike ?"),
        ("<video>a<image>b<video>c<image>", "<image>\n<image>\n<video>\n<video>\nabc"),
    ],
)
def test_images_are_placed_first_then_videos(question, placed):
    assert place_media(question) == placed
    assert place_media(placed) == placed


def test_a_tokenizer_that_does_not_fit_the_template_is_refused():
    """Byte tokens written in reverse: no anchor is a prefix of what follows it."""

    class Reversed:
        bos_token_id = 0

        def convert_tokens_to_ids(self, token):
            return 1

        def encode(self, text, **settings):
            return list(reversed(text.encode()))

    with pytest.raises(UserError, match="does not fit the tokenizer"):
        encode(vicuna(""), Reversed(), [("q", "b")])


def mistral_prompt(turns):
    """LLaVA's conv_mistral_instruct: spaces on both sides of questions and answers, no system prompt."""
    return "".join(f"[INST] {llava_question(question)} [/INST] {answer} </s>" for question, answer in turns)


def llava_preprocess_llama_2(tokenizer, turns):
    """LLaVA's preprocess_llama_2: tokenize the whole prompt; find each round's answer by counting its tokens."""
    prompt = mistral_prompt(turns)
    ids = llava_image_tokens(prompt, tokenizer)
    labels = [IGNORED] * len(ids)
    position = 1  # after BOS
    for text in prompt.split("</s>")[:-1]:
        question, _ = text.split("[/INST] ")
        length = len(llava_image_tokens(text, tokenizer))  # its BOS stands for the </s>
        skipped = (
            len(llava_image_tokens(question + "[/INST] ", tokenizer)) - 2
        )  # without BOS and the last space
        labels[position + skipped : position + length] = ids[position + skipped : position + length]
        position += length
    assert position == len(ids)
    return ids, labels


@pytest.mark.parametrize("legacy", [True, False])
def test_mistral_token_by_token(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    turns = [("<image>\nWhat is it?", "A red car."), ("Where?", "On the road.")]
    ids, labels = encode(mistral(), tokenizer, turns)
    start, end = ["▁[", "INST", "]"], ["▁[", "/", "INST", "]"]
    first = ["<s>", *start, "▁", IMAGE, "▁", "<0x0A>", "What", "▁is", "▁it", "?", *end]
    answer, answer_2 = ["▁A", "▁red", "▁car", ".", "▁", "</s>"], ["▁On", "▁the", "▁road", ".", "▁", "</s>"]
    second = [*(start if legacy else ["[", "INST", "]"]), "▁Where", "?", *end]
    assert pieces(tokenizer, ids) == first + answer + second + answer_2
    assert labels == [IGNORED] * len(first) + ids[len(first) :][:6] + [IGNORED] * len(second) + ids[-6:]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_mistral_is_llavas_preprocessing(sentencepiece, turns, legacy):
    tokenizer = sentencepiece(legacy)
    assert encode(mistral(), tokenizer, turns) == llava_preprocess_llama_2(tokenizer, turns)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_mistral_prompt_is_a_prefix_of_its_row(sentencepiece, legacy):
    tokenizer = sentencepiece(legacy)
    turns = [("<image>\nWhat is it?", "A red car."), ("Where?", "On the road.")]
    ids, labels = encode(mistral(), tokenizer, turns)
    prompt, nothing = encode(mistral(), tokenizer, [turns[0], ("Where?", None)])
    assert prompt == llava_image_tokens(mistral_prompt(turns[:1]) + "[INST] Where? [/INST]", tokenizer)
    assert prompt == ids[: len(prompt)] and nothing == labels[: len(prompt)]


@pytest.mark.parametrize("build", [vicuna, mistral])
def test_videos_are_tokenized_as_images_are(sentencepiece, build):
    tokenizer = sentencepiece(False)
    image_id, video_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    turns = [("<video>\nWhat happens?", "A car stops."), ("And in <video> this?", "It\nstarts.")]
    ids, labels = encode(build(), tokenizer, turns)
    expected, expected_labels = encode(build(), tokenizer, [(q.replace(VIDEO, IMAGE), a) for q, a in turns])
    assert ids == [video_id if token == image_id else token for token in expected]
    assert ids.count(video_id) == 2 and labels == expected_labels


def test_images_and_videos_of_a_question_keep_their_order():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([VIDEO], special_tokens=True)
    ids, _ = encode(chatml("s"), tokenizer, [("<video> like <image>?<video>", "no")])
    assert tokenizer.decode(ids) == chatml_text([("<image>\n<video>\n<video>\nlike ?", "no")], "s")


def test_a_placeholder_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(UserError, match="<video>"):
        encode(chatml("s"), tiny.tokenizer(tiny.SPECIAL[:-1]), [("<video>\nWhat?", "no")])


SPELLED = [
    "</s>",
    "<s>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "[INST]",
    "[/INST]",
    "ASSISTANT:",
    "USER: ",
    "<0x0A>",
]
TEMPLATES = {"vicuna": vicuna(), "mistral": mistral(), "chatml": chatml("s"), "plain": plain()}


@st.composite
def hostile(draw, num_turns):
    """(question, answer) pairs that spell the templates' own texts; `<image>` is a placeholder in a question alone."""
    part = st.sampled_from([*SPELLED, " ", "\n", "a", "é", "漢"]) | st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=5
    )
    text = st.lists(part, max_size=6).map("".join)
    answer = st.lists(part | st.just(IMAGE), max_size=6).map("".join)
    return [(draw(st.sampled_from(["<image>\n", ""])) + draw(text), draw(answer)) for _ in range(num_turns)]


def spelled_out(tokenizer, ids):
    """The ids' text, to the byte: unlike `decode`, with the space that a SentencePiece tokenizer puts before a text."""
    text = b"".join(
        bytes([int(piece[3:5], 16)])
        if re.fullmatch("<0x[0-9A-F]{2}>", piece)
        else piece.replace("▁", " ").encode()
        for piece in pieces(tokenizer, ids)
    )
    return text.decode()


def expected_texts(name, turns, lead):
    """(prompts, answers) of a row as one string each; by itself, text without a space before it gets `lead`."""

    def alone(text):
        return text if text[:1] in ("", " ") else lead + text

    template = TEMPLATES[name]
    if name == "plain":
        return "<s>" + IMAGE * turns[0][0].count(IMAGE), alone(turns[0][1] + "\n")
    answers = [answer + template.answer_suffix for _, answer in turns]
    answers = [
        template.answer_prefix + answer if template.answer_prefix else alone(answer) for answer in answers
    ]
    prompts = [template.user + place_media(question) + template.assistant for question, _ in turns]
    bos = "<s>" if template.adds_bos else ""
    text = bos + template.system + template.separator.join(prompts) + template.separator
    return text, "".join(answer + template.end for answer in answers)


@pytest.fixture(scope="module")
def knowing(sentencepiece, joining):
    """Tokenizers that know the tokens of all templates, by name."""
    found = {
        "bytes": tiny.tokenizer(),
        "joining": joining,
        "legacy": sentencepiece(True),
        "sentencepiece": sentencepiece(False),
    }
    found = copy.deepcopy(found)
    for tokenizer in found.values():
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer.add_tokens(tiny.SPECIAL[3:], special_tokens=True)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "joining", "legacy", "sentencepiece"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_text_forges_a_turn(name, kind, knowing, data):
    tokenizer, template, lead = knowing[kind], TEMPLATES[name], "" if kind in ("bytes", "joining") else " "
    turns = data.draw(hostile(1 if name == "plain" else data.draw(st.integers(1, 3))))
    turns = [(IMAGE + question, answer) for question, answer in turns] if name == "plain" else turns
    ids, labels = encode(template, tokenizer, turns)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    prompt = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    expected_prompt, expected_answers = expected_texts(name, turns, lead)
    text_of = spelled_out if lead else PreTrainedTokenizerFast.decode
    assert text_of(tokenizer, labelled(labels)) == expected_answers
    if lead:  # and one before each chunk of a prompt that is tokenized by itself
        assert spelled_out(tokenizer, prompt).replace(" ", "") == expected_prompt.replace(" ", "")
    else:
        assert tokenizer.decode(prompt) == expected_prompt
    num_controls = {
        "vicuna": 1 + len(turns),
        "mistral": 1 + len(turns),
        "chatml": 2 + 4 * len(turns),
        "plain": 1,
    }[name] + sum(question.count(IMAGE) for question, _ in turns)
    controls = {tokenizer.convert_tokens_to_ids(token) for token in tiny.SPECIAL}
    assert sum(token in controls for token in ids) == num_controls
