"""What a person sees: a program on a terminal, and what stands there in the end."""

import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Callable
from typing import NamedTuple

import pyte


class Seen(NamedTuple):
    status: int
    rows: list[str]  # from the first on, whether still on the screen or scrolled out of it
    written: bytes


def on_terminal(
    program: Callable[[], object], width: int = 80, height: int = 24, close_at: bytes | None = None
) -> Seen:
    """Call a program in a child process that has a terminal of this size for its standard streams.

    Args:
        close_at: once this has been written, the terminal is closed
    """
    child, terminal = pty.fork()
    if not child:
        _be(program, width, height)
    written = b""
    while close_at is None or close_at not in written:
        try:
            written += (more := os.read(terminal, 2**16))
        except OSError:  # how Linux says that nobody has the terminal open any more; macOS gives nothing
            break
        if not more:
            break
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return Seen(os.waitstatus_to_exitcode(status), rows_of(written, width, height), written)


def _be(program: Callable[[], object], width: int, height: int) -> None:
    """The child: ends with the program's status."""
    status = 1
    try:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        os.environ["TERM"] = "xterm-256color"
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        program()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def rows_of(written: bytes, width: int, height: int) -> list[str]:
    screen = pyte.HistoryScreen(width, height, history=100_000)
    pyte.ByteStream(screen).feed(written)
    left = ["".join(row[n].data for n in range(width)) for row in screen.history.top]
    return "\n".join(row.rstrip() for row in [*left, *screen.display]).rstrip("\n").split("\n")


def sides(rows: list[str]) -> list[list[str]]:
    """The rows of two columns, without spaces at their ends; a rule between heading, text and figures is "-"."""
    halves = [row.replace("┼─", "│ ─").partition("│")[::2] for row in rows if row]
    return [
        ["-" if set(half.strip()) == {"─"} else half.rstrip() for half in side]
        for side in ([left for left, _ in halves], [right.removeprefix(" ") for _, right in halves])
    ]
