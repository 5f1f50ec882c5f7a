"""The preflight: find faults of a subset that would spoil a run, before a GPU is taken."""

from data.examples.prepare import Subset
from data.examples.tokens import Examples
from data.preflight.files import check_files
from data.preflight.lengths import ExampleLengths
from data.preflight.report import check_faults, preflight_report
from data.preflight.show import draw_report, print_report
from vzip.files import write_json


def check_subset(
    subset: Subset,
    examples: Examples,
    lengths: ExampleLengths,
    *,
    max_tokens: int,
    max_positions: int,
    seed: int,
) -> None:
    """Check the lengths and files of a subset, and report the faults.

    It prints two tables, and writes `check.json` and `check.png` into the subset's folder.

    Args:
        subset: the prepared data.
        examples: its tokenized conversations.
        lengths: what `measure_lengths` returned for them.
        max_tokens: text tokens at which conversations were cut.
        max_positions: tokens that the language model takes.
        seed: seed of the sample of files that are decoded.

    Raises:
        UserError: a file can't be read, or an example is too long for the language model.
    """
    broken_files = check_files(examples.table, subset.image_folder, index=subset.media_index, seed=seed)
    report = preflight_report(
        lengths,
        broken_files,
        subset.manifest["bad_rows"],
        max_tokens=max_tokens,
        max_positions=max_positions,
    )

    write_json(subset.folder / "check.json", report)
    draw_report(lengths, report, subset.folder / "check.png")
    print_report(report)
    print(f"{subset.folder}: check.json, check.png")

    # This comes last, so that everything is printed and written before the command fails.
    check_faults(report, subset.folder)
