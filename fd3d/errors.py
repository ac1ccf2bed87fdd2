"""How a command ends badly without being broken, and how that is told.

A user's mistake or a failed check is reported as one sentence on stderr, never as a traceback:
`UsageError` exits with 2 (the sentence names the fix), `CheckFailed` with 1. Library code raises
them like any exception; command lines are wrapped once by `exit_code`.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable

_WRONG_KIND = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


class UsageError(ValueError):
    """Input that cannot be used; the message is one sentence that names the fix."""


class CheckFailed(RuntimeError):
    """A check or a run that ended in failure although it was asked for correctly."""


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return the process exit code: 0 done, 1 failed, 2 usage, 130 interrupted.

    141, without a word, when whoever read stdout has left, as `head` does: what the shell says of
    other commands then.
    """
    try:
        main()
        # Met here rather than when Python ends, where nothing can be done about it.
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"failed: {_sentence(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 141
        print(f"failed: {describe_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _reader_left() -> bool:
    """True when nobody reads stdout any more; what is still to be printed goes nowhere then."""
    try:
        out = sys.stdout.fileno()
    except OSError:
        return False
    poll = select.poll()
    poll.register(out, 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if left:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return left


def describe_os_error(error: OSError) -> str:
    """One sentence for an operating-system error, with the fix where there is one."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk{where}: free some and run the same command again (a "
            "training with --resume)"
        )
    if error.errno in (errno.EACCES, errno.EROFS):
        return f"not allowed to write or read{where}: choose another folder or fix its permissions"
    if error.errno in _WRONG_KIND:
        return f"{error.strerror}{where}: give another path, or move what is in the way"
    return f"{error.strerror or _sentence(error)}{where}"


def _sentence(error: Exception) -> str:
    """The message without the traceback that torch puts around an error of a loader's worker."""
    text = str(error)
    if not (text.startswith("Caught ") and "Original Traceback" in text):
        return text
    # The last line of a traceback is "module.Error: message"; our messages are one line.
    return text.rstrip().splitlines()[-1].partition(": ")[2]
