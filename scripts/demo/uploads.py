"""What a visitor may send: pictures that were uploaded, and questions in plain text."""

import unicodedata
from pathlib import Path

from PIL import Image

from vzip import UserError
from vzip.pictures import FORMATS, open_picture

MAX_QUESTION = 2000
"""Most characters of a question."""
NOT_UPLOADED = "Only a picture that was uploaded to this page can be shown: upload it (again)."


def uploaded_file(file: object, folder: str | Path) -> Path:
    """Return the path of a file that a request names as `{"path": ...}`.

    A request may name any path of this machine, so the path says nothing about who may read it. Only
    regular files are opened: a FIFO or a device would block the page.

    Args:
        file: what the request says.
        folder: where the page keeps uploads.

    Raises:
        UserError: the file is not a regular file in the folder.
    """
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str):
        raise UserError(NOT_UPLOADED)

    # Links are followed first: what counts is the file that would be opened.
    try:
        resolved = Path(path).resolve()
        is_upload = resolved.is_relative_to(Path(folder).resolve()) and resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        # E.g. a name that no file can have, or a circle of links.
        raise UserError(NOT_UPLOADED) from error

    if not is_upload:
        raise UserError(NOT_UPLOADED)
    return resolved


def open_upload(path: Path) -> Image.Image:
    """Open an uploaded picture.

    Raises:
        UserError: the file is gone, is not a picture that can be read, or exceeds a limit of
            `vzip.pictures`. The message does not name the path, because visitors read it.
    """
    try:
        return open_picture(path)
    except FileNotFoundError as error:
        raise UserError("This picture is no longer here; upload it again.") from error
    except (OSError, MemoryError) as error:
        raise UserError(
            f"This file is not a picture that can be read; choose another one ({', '.join(FORMATS)})."
        ) from error
    except ValueError as error:
        # The error says which limit is exceeded, or what the decoder could not read.
        reason = str(error).replace(str(path), path.name)
        raise UserError(f"This picture can't be shown ({reason}); choose another one.") from error


def check_question(question: object) -> str:
    """Return a question as the model takes it, without the space around it.

    Raises:
        UserError: the question is empty, too long, or holds characters that are not text.
    """
    if not isinstance(question, str) or not question.strip():
        raise UserError("Type a question.")

    text = question.strip()
    if len(text) > MAX_QUESTION:
        raise UserError(f"This question has {len(text):,} characters; ask in at most {MAX_QUESTION:,}.")

    # Half a surrogate pair can't be encoded, and control characters can't be seen.
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t":
            raise UserError(
                f"This question holds U+{ord(character):04X}, which is not a character of a text; "
                "type the question again."
            )
    return text
