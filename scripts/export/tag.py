"""The tag by which commands recognize an export. It needs neither torch nor transformers."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

# Every export has it in its card. A folder with it may be pushed, or replaced by a newer export.
TAG = "vzip"


def card_metadata(card: str | Path) -> dict[str, Any]:
    """Read the metadata at the top of a card, which anybody may have written.

    It is empty if it can't be parsed.
    """
    try:
        return metadata_load(card) or {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def has_our_card(folder: Path) -> bool:
    """Whether `make export` wrote the folder."""
    card = folder / "README.md"
    tags = card_metadata(card).get("tags") if card.is_file() else None
    return isinstance(tags, list) and TAG in tags
