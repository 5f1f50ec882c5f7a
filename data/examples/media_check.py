"""Check the pictures and videos of examples that were drawn, and fetch what is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.conversations import BadExample, Conversation
from data.examples.bad_examples import check_bad_share, first_lines
from data.fetch.media import Fault, fetch_media
from data.fetch.media_index import MediaIndex
from data.fetch.sources import Source
from vzip import UserError


def first_fault(example: Conversation, reasons: Mapping[str, str]) -> str | None:
    """Describe the first fault among an example's pictures and videos. None without a fault."""
    for path in example.images + example.videos:
        if path in reasons:
            return f"{path}: {reasons[path]}"
    return None


class MediaCheck:
    """Checks the pictures and videos of examples, and fetches those that are missing."""

    def __init__(
        self,
        image_folder: Path,
        media_index: MediaIndex,
        sources: Mapping[str, Sequence[Source]],
        *,
        replace_unreachable: bool,
    ) -> None:
        self.image_folder = image_folder
        self.media_index = media_index
        self.sources = sources
        self.replace_unreachable = replace_unreachable
        self.bad: list[BadExample] = []
        self.num_examples = 0

    def __call__(self, examples: Sequence[Conversation]) -> dict[str, str]:
        """Return the faults by path. Raise UserError if too much is wrong, or servers did not answer."""
        # All media together, so that one pool of threads fetches them.
        media = []
        for example in examples:
            for kind, paths in example.media.items():
                media += [(kind, path, example.source) for path in paths]

        # A server that is down now may answer later. By default this ends the command, because
        # replacements would make another subset than on other machines.
        faults = fetch_media(media, self.image_folder, sources=self.sources, media_index=self.media_index)
        if not self.replace_unreachable:
            self._check_all_answered(faults)

        reasons = {path: fault.reason for path, fault in faults.items()}
        self._check_local(examples, reasons)
        return reasons

    def _check_all_answered(self, faults: Mapping[str, Fault]) -> None:
        """Raise UserError if a picture may still come in a later command."""
        reasons = []
        for path, fault in faults.items():
            if not fault.final:
                reasons.append((path, fault.reason))

        if reasons:
            raise UserError(
                f"{len(reasons)} pictures could not be fetched now. Run the same command again: it resumes. "
                f"If the pictures will not come back, replace their examples by others of the same source "
                f"with data.replace_unreachable=true. The first ones:\n{first_lines(reasons)}"
            )

    def _check_local(self, examples: Sequence[Conversation], reasons: Mapping[str, str]) -> None:
        """Raise UserError if too many examples are bad whose pictures are not fetched."""
        # Without a source, all pictures must be in the folder already.
        for example in examples:
            fault = first_fault(example, reasons)
            if fault is not None and not self.sources.get(example.source):
                self.bad.append(BadExample(example.id, example.source, fault))

        # The first call gets the whole subset. Replacements in later calls do not enlarge it.
        if not self.num_examples:
            self.num_examples = len(examples)
        check_bad_share(self.bad, self.num_examples)
