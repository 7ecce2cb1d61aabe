"""Text for people to read, also from others, which must not control the terminal it is shown on."""

import re
from datetime import timedelta
from typing import TextIO

# C0 and C1 but the line end, marks of direction, Unicode's own line ends, and halves of characters, which in a path
# stand for bytes that are no UTF-8
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escape what would move the cursor, colour the screen or turn the writing direction; line ends stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def joined(items: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1])] * (len(items) > 1) + items[-1:])


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:20:51."""
    return str(timedelta(seconds=round(seconds)))


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines that may have names, paths or texts of others in them; on stdout, unless `file` is given."""
    print(*map(printable, lines), sep="\n", file=file)
