"""Conversation templates: ids and labels, against lists worked out by hand and LLaVA's own rule."""

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


# Against LLaVA's preprocessing


def llava_image_tokens(prompt, tokenizer):
    """LLaVA's tokenizer_image_token: BOS, and every chunk between images by itself."""
    ids = [tokenizer.bos_token_id]
    for index, chunk in enumerate(prompt.split(IMAGE)):
        ids += [tokenizer.convert_tokens_to_ids(IMAGE)] if index else []
        # LLaVA's slow tokenizer puts a space before every text, also before one that has a space.
        space = " " if chunk.startswith((" ", "▁")) else ""
        ids += tokenizer.encode(space + chunk, add_special_tokens=False)
    return ids


def llava_question(question):
    """LLaVA's preprocess_multimodal."""
    return (IMAGE + "\n" + question.replace(IMAGE, "").strip()).strip() if IMAGE in question else question


def llava_vicuna(tokenizer, turns, *, system="", legacy=False):
    """LLaVA's preprocess_v1: tokenize the whole prompt; find each answer by counting tokens."""
    prompt = system
    for question, answer in turns:
        prompt += f"USER: {llava_question(question)} ASSISTANT: {answer}</s>"
    ids = llava_image_tokens(prompt, tokenizer)
    labels = [IGNORED] * len(ids)
    position = 1  # after BOS
    for index, text in enumerate(prompt.split("</s>")[:-1]):
        question, _ = text.split(" ASSISTANT: ")
        # Each round is counted with a BOS, which stands for its </s>; in the prompt, a later round
        # has no leading space.
        joined = 1 if index and not legacy else 0
        length = len(llava_image_tokens(text, tokenizer)) - joined
        skipped = len(llava_image_tokens(question + " ASSISTANT: ", tokenizer)) - 2 - joined
        labels[position + skipped : position + length] = ids[position + skipped : position + length]
        position += length
    assert position == len(ids)
    return ids, labels


def mistral_prompt(turns):
    """LLaVA's conv_mistral_instruct: spaces around questions and answers, no system prompt."""
    return "".join(f"[INST] {llava_question(question)} [/INST] {answer} </s>" for question, answer in turns)


def llava_mistral(tokenizer, turns):
    """LLaVA's preprocess_llama_2: tokenize the whole prompt; find each answer by counting tokens."""
    prompt = mistral_prompt(turns)
    ids = llava_image_tokens(prompt, tokenizer)
    labels = [IGNORED] * len(ids)
    position = 1  # after BOS
    for text in prompt.split("</s>")[:-1]:
        question, _ = text.split("[/INST] ")
        length = len(llava_image_tokens(text, tokenizer))  # its BOS stands for the </s>
        # Neither the BOS nor the last space belongs to the question.
        skipped = len(llava_image_tokens(question + "[/INST] ", tokenizer)) - 2
        labels[position + skipped : position + length] = ids[position + skipped : position + length]
        position += length
    assert position == len(ids)
    return ids, labels


def llava_plain(tokenizer, caption):
    """LLaVA's preprocess_plain."""
    ids = llava_image_tokens(f"{IMAGE}{caption}\n", tokenizer)
    skipped = len(llava_image_tokens(IMAGE, tokenizer))
    return ids, [IGNORED] * skipped + ids[skipped:]


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
def test_vicuna_and_mistral_are_llavas_preprocessing(llama, legacy, turns):
    for system in ("", VICUNA_SYSTEM):
        expected = llava_vicuna(llama, turns, system=system, legacy=legacy)
        assert encode(vicuna(system), llama, turns) == expected
    assert encode(mistral(), llama, turns) == llava_mistral(llama, turns)


def test_the_default_system_prompt_is_vicunas(llama):
    ids, _ = encode(vicuna(), llama, [("<image>\nHi", None)])
    before_image = ids[: ids.index(llama.convert_tokens_to_ids(IMAGE))]
    assert before_image == llava_image_tokens(VICUNA_SYSTEM + "USER: ", llama)
    assert VICUNA_SYSTEM.startswith("A chat between a curious user and an artificial intelligence")


LLAVA_TEXT = st.text("ab Z19.,:?!\n-é漢", min_size=1).filter(str.strip)


@given(
    turns=st.lists(st.tuples(LLAVA_TEXT, LLAVA_TEXT), min_size=1, max_size=3),
    image_at=st.integers(0, 3),
)
def test_vicuna_is_llavas_preprocessing_for_any_text(sentencepiece, turns, image_at):
    if image_at < len(turns):
        question, answer = turns[image_at]
        turns[image_at] = (f"{IMAGE}\n{question}", answer)
    assert encode(vicuna(""), sentencepiece[False], turns) == llava_vicuna(sentencepiece[False], turns)


@pytest.mark.parametrize("question", ["<image>", "<image>\n", "<image> \n "])
def test_a_question_that_is_only_an_image_is_as_in_llava(llama, legacy, question):
    turns = [(question, "A red car."), ("Where?", "Here.")]
    encoded = encode(vicuna(""), llama, turns)
    assert encoded == llava_vicuna(llama, turns, legacy=legacy)
    assert encode(mistral(), llama, turns) == llava_mistral(llama, turns)

    # LLaVA's tokenizer puts a space before the text behind the picture, which starts with one.
    behind = pieces(llama, encoded[0])[pieces(llama, encoded[0]).index(IMAGE) + 1 :]
    assert "".join(behind).startswith("▁▁ASSISTANT:")


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
@pytest.mark.parametrize("spelled", ["<s>", "USER: hi", "ASSISTANT:", "[INST] x", "<0x0A>"])
def test_other_spellings_keep_their_loss(llama, build, spelled):
    _, labels = encode(build(), llama, [(f"<image>\n{spelled}", f"it is {spelled}")])
    assert IGNORED in labels and set(labels) != {IGNORED}


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


def test_a_blank_answer_has_loss(llama, legacy):
    turns = [("<image>\nWhat?", " "), ("Where?", "Here.")]
    assert encode(vicuna(""), llama, turns) == llava_vicuna(llama, turns, legacy=legacy)


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


@given(caption=st.text("ab Z19.,:?!\n-é漢▁"), legacy=st.booleans())
def test_plain_is_llavas_preprocessing_for_any_caption(sentencepiece, caption, legacy):
    tokenizer = sentencepiece[legacy]
    encoded = encode(plain(), tokenizer, [("What is it?\n<image>", caption)])
    assert encoded == llava_plain(tokenizer, caption)


# ChatML


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

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [index for index, token in enumerate(ids) if token == end]
    assert [labels[index] != IGNORED for index in ends] == [False, False, True, False, True, False, True]
    assert all(labels[index + 1] == IGNORED for index in ends)
    assert tokenizer.decode(with_loss(labels)) == "A red car.<|im_end|> On the\nroad.<|im_end|>ok<|im_end|>"


def test_chatml_joins_nothing_across_answers(joining):
    turns = [("<image>\nWhat?\n\nreally?", "A x."), ("Where?", "On\n\n x")]
    ids, labels = encode(chatml("Be kind."), joining, turns)
    assert ids == joining.encode(chatml_text(turns), add_special_tokens=False)
    assert joining.decode(with_loss(labels)) == "A x.<|im_end|>On\n\n x<|im_end|>"


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
    if build is mistral:
        text = mistral_prompt(TURNS[:1]) + "[INST] Where? [/INST]"
        assert prompt == llava_image_tokens(text, llama)


# Placeholders


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
