"""What a command says when it ends badly, and its exit code."""

import errno
import os
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from fd3d.errors import CheckFailed, UsageError, exit_code


class Broken(Dataset):
    """Raises the given error for every item, as a data set with a missing picture does."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, item):
        raise self.error


ENDINGS = [
    (UsageError("image a.jpg is missing: fetch it"), 2, "error: image a.jpg is missing: fetch it"),
    (CheckFailed("loss is not finite"), 1, "failed: loss is not finite"),
    (OSError(errno.ENOSPC, "full", "x"), 1, "failed: no space left on the disk at x"),
    (OSError(errno.EACCES, "no", "x"), 1, "failed: not allowed to write or read at x"),
    (OSError(errno.EIO, "I/O error", "x"), 1, "failed: I/O error at x"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


def fail(error):
    raise error


@pytest.mark.parametrize(("error", "code", "says"), ENDINGS)
def test_each_ending_has_its_code_and_one_line(error, code, says, capsys):
    assert exit_code(lambda: fail(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith(says) and printed.count("\n") == 1


@pytest.mark.parametrize(("error", "code", "says"), ENDINGS[:2])
def test_an_error_of_a_loader_worker_is_told_like_any_other(error, code, says, capsys):
    loader = DataLoader(Broken(error), num_workers=1)
    assert exit_code(lambda: list(loader)) == code
    assert capsys.readouterr().err == f"{says}\n"


def test_success_is_zero_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    with pytest.raises(KeyError):
        exit_code(lambda: {}["a bug"])


@pytest.mark.parametrize("length", [5, 500_000])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_is_no_failure_to_tell(length, buffered):
    code = (
        "import sys; from fd3d.errors import exit_code\n"
        "sys.stdin.read()\n"
        f"sys.exit(exit_code(lambda: print('x' * {length})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_a_broken_pipe_elsewhere_is_told(capsys):
    assert exit_code(lambda: fail(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 1
    assert capsys.readouterr().err == "failed: Broken pipe\n"
