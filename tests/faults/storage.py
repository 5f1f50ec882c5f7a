"""Disks that are full, files that are damaged, and things that are no files."""

import os
import random
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.faults.world import NUM_STEPS, World, check_end, check_same_bits, module
from tests.helpers.commands import metrics

FILLER = "filler"
"""Name of the file that fills a disk."""


def disk(world: World, rng: random.Random, number: int) -> None:
    """Take the space away from a run at a random step, and give it back."""
    step = rng.randint(1, NUM_STEPS - 1)
    reference = world.reference()
    name = f"disk-{number}"
    if number % 2 == 0 and (small := _small_disk(world)):
        world.description = f"disk full after step {step}"
        settings = [*world.settings(name), f"runs={small}"]
        run = small / name
        fill = f"import tests.faults.storage as s; s.fill({str(small)!r})"
        (script,) = world.begin_tune(settings, script=world.hooked(step, fill))
        done = world.end(script)
        (small / FILLER).unlink()
    else:
        # This works for every user: no file of the process may grow beyond some bytes. What it prints
        # is a file too, and smaller; weights and states are larger.
        most = rng.choice([8000, 10_000, 12_000])
        world.description = f"files limited to {most} bytes after step {step}"
        settings = world.settings(name)
        run = world.runs / name
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))"
        (script,) = world.begin_tune(settings, script=world.hooked(step, limit))
        done = world.end(script)

    check_end(done, 2)
    check_end(world.tune(settings), 0)
    check_same_bits(run, reference)
    shutil.rmtree(run)


def _small_disk(world: World) -> Path | None:
    """Return a disk of its own in memory, for those who may mount one."""
    folder = world.folder / "small"
    if not os.path.ismount(folder):
        folder.mkdir(exist_ok=True)
        # A run wants 100 MB to be free before it begins.
        mount = ["mount", "-t", "tmpfs", "-o", "size=104m", "vzip-faults", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            return None
    return folder


def unmount(world: World) -> None:
    """Give the small disk back."""
    folder = world.folder / "small"
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: str) -> None:
    """Write until the disk is full. A run calls this between two steps."""
    # Large blocks, and then small ones into what they leave.
    with Path(folder, FILLER).open("wb", buffering=0) as opened:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    opened.write(bytes(size))


def unchanged(rng, content):
    return content


def half(rng, content):
    return content[: len(content) // 2]


def nothing(rng, content):
    return b""


def zeros(rng, content):
    return bytes(len(content))


def flipped(rng, content):
    changed = bytearray(content)
    for _ in range(3):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def no_text(rng, content):
    return b"\xff\xfe" + content


def nested(rng, content):
    return b"[" * 100_000


def another_type(rng, content):
    return rng.choice([b"[]", b"null", b"3", b"{}"])


DAMAGES = [half, nothing, zeros, flipped, no_text, nested, another_type]


def corrupt(world: World, rng: random.Random, number: int) -> None:
    """Damage one file of a run, of one that was stopped or of a finished one."""
    # The first run is whole, so its commands must do their work.
    damage = rng.choice(DAMAGES) if number else unchanged
    codes = (0, 2) if number else (0,)
    name = f"corrupt-{number}"
    reference = world.reference()
    if number % 2:
        run = world.stopped(name)
    else:
        run = Path(shutil.copytree(reference, world.runs / name))

    # An empty file has nothing to damage.
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    file = rng.choice(files)
    world.description = f"{file.relative_to(run)}: {damage.__name__}"
    file.write_bytes(damage(rng, file.read_bytes()))

    done = world.tune(world.settings(name))
    check_end(done, *codes)
    if number % 2:
        # Damage to metrics loses lines of steps that are not taken again.
        if done.returncode == 0 and file.name != "metrics.jsonl":
            check_same_bits(run, reference)
        elif done.returncode == 0:
            assert set(metrics(run)) <= set(metrics(reference)), "other losses"
    else:
        check_end(world.run(world.load_script, run), *codes)
        export = module("scripts.export.main", run, "hf", "--out", world.folder / f"{name}-hf")
        check_end(world.run(*export), *codes)
    shutil.rmtree(run)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


PLACES = ["picture", "examples", "held-out", "config.yaml", "metrics.jsonl", "manifest.json", "state", "lock"]
OTHERS = [_pipe, _endless, _folder, _loop]


def special(world: World, rng: random.Random, number: int) -> None:
    """Put a pipe, a device, a folder or a link to itself where a file should be."""
    place = PLACES[number % len(PLACES)]
    make = rng.choice(OTHERS)
    world.description = f"{make.__name__.strip('_')} in place of {place}"
    name = f"special-{number}"
    more = []
    if place in ("picture", "examples", "held-out"):
        data = Path(shutil.copytree(world.folder / "data", world.folder / name))
        target = {"picture": "images/noise/train5.png", "examples": "train.json", "held-out": "test.json"}[
            place
        ]
        path = data / target
        more = [
            f"data.path={data}/train.json",
            f"data.image_folder={data}/images",
            f"data.held_out={data}/test.json",
        ]
        more.append("evaluate.questions=2")
    else:
        run = world.stopped(name)
        path = run / place
        if place == "state":
            path = max((run / "state").iterdir()) / "state.json"
        elif place == "lock":
            path = run.with_name(f".{name}.lock")
    path.unlink(missing_ok=True)
    make(path)

    settings = world.settings(name, *more)
    check_end(world.tune(settings), 0, 2)
    if place == "picture":
        check_end(world.run(*module("scripts.prepare.check", *settings)), 0, 2)
