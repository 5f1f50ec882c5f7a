"""Send an export to the Hugging Face hub.

python scripts/push.py runs/my-run/export/hf --repo me/my-model --private --dry-run
"""

import argparse
import sys
from pathlib import Path

# Import from the repository, whatever folder this file is started in.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.table import Table

from scripts.export.tag import has_our_card
from train.cli import exit_on_user_error
from vzip import UserError

HUB_ERRORS = HfHubHTTPError.__bases__
"""Errors of the hub's client: OSError, and the error of the HTTP library that its version uses."""


def files_of(folder: Path) -> list[Path]:
    """List the files of an export.

    Raises UserError for any other folder, and for a link to a file that is gone, or holds no weights.
    """
    if not has_our_card(folder):
        raise UserError(f"{folder} is not an export; make one with `make export RUN=... TO=hf`")

    # Without --copy, an export links to the base model's files. A link to nothing is no file.
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    gone = [path.name for path in files if not path.is_file()]
    if gone:
        raise UserError(
            f"{folder}: {', '.join(gone)} link to files of the base model that are gone; "
            f"export again with --copy"
        )
    # A folder from somebody else may hold links to anything on this machine.
    foreign = [path.name for path in files if path.is_symlink() and not _holds_weights(path)]
    if foreign:
        raise UserError(
            f"{folder}: {', '.join(foreign)} link to something other than weights, which "
            "`make export` never does; export again"
        )
    return files


def _holds_weights(path: Path) -> bool:
    """Whether a file looks like one of safetensors: an export links to no others."""
    # Such a file begins with the size of its header in 8 bytes, and a JSON object.
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" and start[8:] == b"{"


def print_files(folder: Path, files: list[Path]) -> None:
    """Print the files and their sizes. For a link, the size of the file that it leads to."""
    # Show what would be sent, so that --dry-run can be checked.
    table = Table("file", "MB")
    table.columns[1].justify = "right"
    total = 0
    for path in files:
        size = path.stat().st_size
        total += size
        table.add_row(path.relative_to(folder).as_posix(), f"{size / 1e6:,.3f}")
    table.add_row("all", f"{total / 1e6:,.3f}")
    Console().print(table)


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Send the files in one commit, and return its address.

    Raises UserError without a token, or if the hub refuses.
    """
    if get_token() is None:
        raise UserError(
            "there is no token for the hub; run `hf auth login`, or set HF_TOKEN, with one that may write"
        )

    # A repository that exists keeps its visibility. One commit holds all files, so that a failure
    # leaves nothing half sent.
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of vzip")
        return str(commit.commit_url)
    except HUB_ERRORS as error:
        raise UserError(
            f"--repo {repo} could not be sent: {error}\nCheck the network, and that the token may write there"
        ) from error


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder that `make export` wrote")
    parser.add_argument(
        "--repo", required=True, help="name on the hub, e.g. me/my-model; it is created if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--dry-run", action="store_true", help="list the files, and send nothing")
    args = parser.parse_args()

    # Check the name before the files, because --dry-run must find this mistake too.
    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise UserError(f"--repo {args.repo}: {error}") from error

    # List the files, with the names and sizes that others will see.
    files = files_of(args.folder)
    visibility = "private" if args.private else "public"
    print(f"{args.folder} to {args.repo}, {visibility} if it is new")
    print_files(args.folder, files)
    if args.dry_run:
        print("nothing was sent: --dry-run")
    else:
        print(push(args.folder, args.repo, private=args.private))


if __name__ == "__main__":
    main()
