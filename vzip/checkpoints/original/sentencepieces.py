"""The tokenizer of a Llama's `tokenizer.model`, with the ids that SentencePiece gives."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from vzip.errors import UserError


def _piece_scores(model_file: Path) -> dict[str, float]:
    """Read the score of each piece. Raises UserError if the file is not a SentencePiece model."""
    # Imported here, because only checkpoints without tokenizer.json need this package.
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.load(str(model_file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model_file} is not a SentencePiece model: {error}; get it again") from error

    scores = {}
    for index in range(pieces.get_piece_size()):
        scores[pieces.id_to_piece(index)] = pieces.get_score(index)
    return scores


def load_sentencepiece_tokenizer(path: str, model_file: Path) -> Any:
    """Load the LlamaTokenizer of a folder or hub id with `tokenizer.model` and no `tokenizer.json`.

    transformers 5 merges pieces in the order of their ids, SentencePiece in the order of their
    scores. The two differ for runs of white space: those pieces have the first ids after the bytes,
    but the lowest score. The order of the scores is restored here. One difference stays: a text
    that starts with a space gets no second one before it. `vzip.templates.pieces` adds it.

    Args:
        path: the folder or hub id.
        model_file: its `tokenizer.model`, on disk.

    Raises:
        UserError: `sentencepiece` or `protobuf`, which read the file, is missing; or the file is
            not a SentencePiece model.
    """
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise UserError(
            f"reading {model_file} needs sentencepiece and protobuf, which are not installed: "
            f"pip install 'vzip[llava]'"
        )
    scores = _piece_scores(model_file)

    # LLaVA's code adds a BOS token if the folder does not say otherwise; transformers 5 does not.
    add_bos_token = get_tokenizer_config(path).get("add_bos_token", True)
    tokenizer = LlamaTokenizer.from_pretrained(path, add_bos_token=add_bos_token, trust_remote_code=False)

    # Put the merges into the order of SentencePiece: a merge is as good as the score of its result.
    # The sort is stable, so merges of equal score keep the order of their ids.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"].sort(key=lambda pair: -scores[pair[0] + pair[1]])
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(backend)).model
    return tokenizer
