"""The tokenizer of a Llama's `tokenizer.model`, with the ids that SentencePiece gives."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from vzip.errors import UserError


def load_sentencepiece_tokenizer(path: str, model_file: Path) -> Any:
    """LlamaTokenizer of a folder or hub id that has `tokenizer.model` and no `tokenizer.json`.

    transformers 5 puts the merges in the order of the pieces' ids. SentencePiece goes by their scores, and the two differ for
    runs of white space: those pieces have the first ids after the bytes, but the lowest score. The scores are restored here.
    What stays is that a text which starts with a space gets no second one before it, as SentencePiece would put.

    Args:
        path: the folder or hub id.
        model_file: its `tokenizer.model`, on disk.

    Raises:
        UserError: no `sentencepiece` or `protobuf`, which reading the file takes, or a file that is not SentencePiece's.
    """
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise UserError(
            f"{model_file} can't be read without its libraries: `pip install sentencepiece protobuf`"
        )
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.load(str(model_file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model_file} is not a SentencePiece model: {error}; get it again") from error
    scores = {pieces.id_to_piece(index): pieces.get_score(index) for index in range(pieces.get_piece_size())}
    # What LLaVA's code took where the folder does not say, but transformers 5 does not.
    tokenizer = LlamaTokenizer.from_pretrained(
        path, add_bos_token=get_tokenizer_config(path).get("add_bos_token", True)
    )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"].sort(
        key=lambda pair: -scores[pair[0] + pair[1]]
    )  # stable: by id where scores are equal
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(backend)).model
    return tokenizer
