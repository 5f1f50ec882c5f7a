"""Export a finished run: the whole model for transformers, mm_projector.bin for LLaVA's own code, or an adapter for peft.

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
from vzip import UserError
from vzip.runs.export import write_hf, write_llava, write_peft
from vzip.runs.projector import read_meta

FORMATS = ("hf", "llava", "peft")


def check_target(target: Path, *, force: bool) -> None:
    """Raises UserError for a place that has something already; an older export may be replaced."""
    if not target.exists():
        return
    if not has_our_card(target):
        raise UserError(
            f"--out {target} is there already and is no export, so that it is not replaced; choose another place"
        )
    if not force:
        raise UserError(
            f"--out {target} is an export already; replace it with --force, or choose another place"
        )


def _give_usual_modes(folder: Path) -> None:
    """Let others read, as far as this process' umask does: safetensors writes files for their owner alone.

    Files of the base model that are linked here keep their modes.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(0o666 & ~umask)


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` once the block has ended; nothing stays if it fails.

    What a killed process left is deleted by the next one.
    """
    new, old = (target.with_name(f".{target.name}.{state}") for state in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _give_usual_modes(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def export(args: argparse.Namespace) -> Path:
    """Write the export, and return where it is. Raises UserError as `vzip.runs.export` does, and for what does not go together."""
    run, target = args.run, args.out or args.run / "export" / args.to
    if args.to not in FORMATS:
        raise UserError(f"TO={args.to} is unknown; choose one of: {', '.join(FORMATS)}")
    if args.to != "hf" and (args.copy or args.budget is not None):
        raise UserError(f"--copy and --budget are of TO=hf, not of TO={args.to}: leave them out")
    base = args.base or read_meta(run)["base"]["id"]
    check_target(target, force=args.force)
    try:
        with written_beside(target) as folder:
            if args.to == "hf":
                write_hf(run, folder, base=args.base, budget=args.budget, copy=args.copy)
            else:
                {"llava": write_llava, "peft": write_peft}[args.to](run, folder, base=args.base)
            (folder / "README.md").write_text(model_card(run, folder, to=args.to, base=base))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of these, by who writes
        raise UserError(
            f"{target} can't be written: {error}\nFree some space, or choose another place with --out"
        ) from error
    return target


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("to", metavar="|".join(FORMATS), help="format")
    parser.add_argument("--out", type=Path, help="where to; by default RUN/export/FORMAT")
    parser.add_argument(
        "--base", help="folder or hub id of the base model, if it is not where the run found it"
    )
    parser.add_argument(
        "--budget", type=count, help="hf: the budget that vzip.load takes by default, of a run with several"
    )
    parser.add_argument(
        "--copy", action="store_true", help="hf: copy the base's files instead of linking them"
    )
    parser.add_argument("--force", action="store_true", help="replace an export that is there already")
    target = export(parser.parse_args())
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size / 1e6:12,.3f} MB  {file.name}")
    print(target)


if __name__ == "__main__":
    main()
