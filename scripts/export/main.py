"""Export a finished run: for transformers (whole model), LLaVA (mm_projector.bin) or peft.

make export RUN=runs/my-run TO=hf        python -m scripts.export.main runs/my-run hf --out FOLDER
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from scripts.export.card import model_card
from scripts.export.tag import has_our_card
from train.cli import count, exit_on_user_error
from train.runs import FinishedRun
from vzip import UserError
from vzip.runs.export import write_hf, write_llava, write_peft
from vzip.runs.meta import read_meta

FORMATS = ("hf", "llava", "peft")


def check_target(target: Path, *, force: bool) -> None:
    """Raise UserError if the target exists, unless it is an older export that may be replaced."""
    if not target.exists():
        return

    # --force must not delete somebody's own folder.
    if not has_our_card(target):
        raise UserError(
            f"--out {target} exists and is not an export, so it is not replaced; choose another folder"
        )
    if not force:
        raise UserError(
            f"--out {target} is an export already; replace it with --force, or choose another folder"
        )


def _apply_umask(folder: Path) -> None:
    """Give the files the permissions of ordinary new files.

    safetensors writes files that only their owner can read. Files of the base model that are linked
    here keep their permissions.
    """
    # The umask can only be read by setting it, so set it back at once.
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        # A hard link shares its permissions with the base model's file.
        is_own = path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
        if is_own:
            path.chmod(0o666 & ~umask)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Make a folder to write into, which replaces `target` when the block has ended.

    If the block fails, `target` stays as it was. The next call deletes what a killed process left.
    """
    # Both lie beside the target, because a rename can't go to another disk.
    new = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _apply_umask(new)

        # A folder can't be renamed onto one that holds files, so the old export goes aside first.
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def export(args: argparse.Namespace) -> Path:
    """Write the export, and return its folder.

    Raises:
        UserError: options that contradict each other, a run that can't be exported (see
            `vzip.runs.export`), or a target that can't be written.
    """
    # Everything that can be refused is refused before the model is loaded.
    run = args.run
    target = args.out or FinishedRun(run).own_folder("export") / args.to
    if args.to not in FORMATS:
        raise UserError(f"TO={args.to} is unknown; choose one of: {', '.join(FORMATS)}")
    if args.to != "hf" and (args.copy or args.budget is not None):
        raise UserError(f"--copy and --budget belong to TO=hf, not to TO={args.to}; leave them out")

    # The card names the base model, also if --base does not.
    base = args.base or read_meta(run)["base"]["id"]
    check_target(target, force=args.force)

    try:
        with atomic_folder(target) as folder:
            if args.to == "hf":
                write_hf(run, folder, base=args.base, budget=args.budget, copy=args.copy)
            elif args.to == "llava":
                write_llava(run, folder, base=args.base)
            else:
                write_peft(run, folder, base=args.base)

            # The card comes last, because it says which files there are.
            (folder / "README.md").write_text(model_card(run, folder, to=args.to, base=base))
    except (OSError, RuntimeError, SafetensorError) as error:
        # A full disk raises any of these, depending on the library that was writing.
        raise UserError(
            f"{target} can't be written: {error}\nFree some space, or choose another place with --out"
        ) from error
    return target


def export_parser() -> argparse.ArgumentParser:
    """Make the parser of this command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("to", metavar="|".join(FORMATS), help="format")
    parser.add_argument("--out", type=Path, help="folder of the export, by default RUN/export/FORMAT")
    parser.add_argument("--base", help="folder or hub id of the base model, if it has moved since the run")
    parser.add_argument(
        "--budget",
        type=count,
        help="hf: the budget that vzip.load takes by default, for a run with several",
    )
    parser.add_argument(
        "--copy", action="store_true", help="hf: copy the base's files instead of linking them"
    )
    parser.add_argument("--force", action="store_true", help="replace an older export")
    return parser


@exit_on_user_error
def main() -> None:
    """Export a run, and list the files that were written."""
    target = export(export_parser().parse_args())
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size / 1e6:12,.3f} MB  {file.name}")
    print(target)


if __name__ == "__main__":
    main()
