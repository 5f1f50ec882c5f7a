"""A small SentencePiece model with the settings of LLaMA's tokenizer, trained in a second."""

from pathlib import Path

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
"""A text that is always there, with enough different words for the pieces."""

NUM_PIECES = 1000

WHOLE_WORDS = (
    "ASSISTANT INST What Where Say Be kind is it A a red car On the road Two and Describe assistant answers"
)
"""Words that become one piece each, at the start of a word (`▁car`) and inside of one (`car`)."""


def save_sentencepiece_model(folder: Path):
    """Write `tokenizer.model`: byte-pair encoding with bytes to fall back on, as LLaMA's has it."""
    import sentencepiece

    lines = LICENSE.read_text(encoding="utf-8").splitlines()
    for word in WHOLE_WORDS.split():
        # Seen behind other letters as well, a word is merged before its space is.
        lines += [f"{word} x{word} y{word} z{word}?"] * 300

    # As in LLaMA: `USER` is one piece inside of a text, and two behind a space (`▁US`, `ER`).
    # LLaVA's masks count on it.
    lines += ["US US US ER xER yER"] * 300
    lines += ["xUSER yUSER zUSER"] * 100

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=NUM_PIECES,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
