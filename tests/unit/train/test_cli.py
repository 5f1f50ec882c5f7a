"""How commands end, and the types of their arguments."""

import argparse
import errno
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from train.cli import _explain, count, exit_on_user_error, output, writable
from vzip import UserError


@pytest.mark.integration
@pytest.mark.parametrize(
    ("raised", "message", "code"),
    [
        ("UserError('optim.lr=0 must be positive')", "error: optim.lr=0 must be positive\n", 2),
        ("OSError(28, 'No space left on device')", "error: the disk is full", 2),
        (
            "__import__('torch').OutOfMemoryError('CUDA out of memory')",
            "error: the GPU's memory ran out (CUDA out of memory); make batch",
            2,
        ),
        (
            "RuntimeError('[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] "
            "Connection closed by peer') if __import__('torch') else None",
            "error: a rank can't reach another one any more ([pytorch",
            2,
        ),
        ("KeyboardInterrupt()", "error: stopped; the same command goes on", 130),
        ("Stopped(15, 4, 8)", "error: stopped by SIGTERM after 4 of 8 steps, which are saved", 143),
        ("OSError(30, 'Read-only file system')", "error: the disk is read-only ([Errno 30]", 2),
        ("PermissionError(13, 'Permission denied', 'x')", "error: this user may not open a file", 2),
        ("open('x' * 300)", "error: a file's name is too long", 2),
        (
            "__import__('safetensors').SafetensorError('No space left on device (os error 28)')",
            "error: the disk is full (No space left on device (os error 28))",
            2,
        ),
    ],
)
def test_a_user_error_is_printed_and_ends_the_command(raised, message, code):
    program = (
        "from train.cli import exit_on_user_error; from vzip.errors import UserError\n"
        "from train.guards.signals import Stopped\n"
        f"@exit_on_user_error\ndef main(): raise {raised}\n"
        "main(); print('went on')"
    )
    env = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_other_errors_pass_through(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"exit {code}"))  # it would end pytest itself

    @exit_on_user_error
    def command(error):
        if error:
            raise error

    command(None)
    for error in (OSError(errno.ENOEXEC, "no"), ValueError("a bug"), SystemExit()):
        with pytest.raises(type(error)):
            command(error)


def test_torch_does_not_say_that_the_disk_is_full(monkeypatch, tmp_path):
    """Its writer only says that the file is shorter than it should be."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")
    settings = SimpleNamespace(runs=str(tmp_path))
    assert _explain(error, [settings]) is None

    usage = shutil.disk_usage(tmp_path)
    is_full = lambda folder: usage._replace(free=0 if str(folder) == str(tmp_path) else 2**30)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", is_full)
    assert f"the disk is full (below {tmp_path})" in _explain(error, [settings])
    assert _explain(RuntimeError("shapes differ"), [settings]) is None


@pytest.mark.integration
def test_a_report_starts_without_torch():
    program = "import sys; import scripts.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_a_count_is_a_whole_number(text):
    assert count("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} must be a whole number"):
        count(text)


def test_the_folder_of_an_output_is_made_or_the_option_named(tmp_path):
    assert writable(str(tmp_path / "new" / "figures.json")).parent.is_dir()
    target = tmp_path / "other" / "figure.png"
    with output("--out", target):
        target.write_text("drawn")

    with pytest.raises(argparse.ArgumentTypeError, match="can't be written"):
        writable(str(target / "below a file"))
    with pytest.raises(
        UserError, match=r"--out=.*can't be written: .*; free some space, or give another path"
    ):
        with output("--out", target / "below a file"):
            pass
