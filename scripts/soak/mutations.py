"""Files as they are after a bad disk, a broken copy or a careless edit."""

import re
from random import Random

WORDS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"nan", b"999999999999", b"[]", b"{}", b'"x"', b"''", b"[[", b"\xff\xfe",
    b"\0", b"${seed}", b"!!int", b"&a *a", b"1.5", b"../x", "ß".encode(),
)  # fmt: skip
VALUE = rb"(?<=[:\[,] )[^\s,\]]+|(?<=- )\S+"  # in YAML and in JSON


def mutate(content: bytes, name: str, random: Random) -> bytes:
    """Another content for a file, never the same."""
    ways = [flip, cut_off, cut_out, repeat, overwrite]
    if not name.endswith(".ckpt"):
        ways += [empty, swap_lines, drop_line, insert_word, *[replace_value] * 4]
    while (mutated := random.choice(ways)(content, random)) == content:
        ways.append(flip)
    return mutated


def flip(content: bytes, random: Random) -> bytes:
    """Up to eight bits."""
    flipped = bytearray(content)
    for _ in range(random.randint(1, 8)):
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def empty(content: bytes, random: Random) -> bytes:
    return b""


def cut_off(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def cut_out(content: bytes, random: Random) -> bytes:
    start, end = place(content, random)
    return content[:start] + content[end:]


def repeat(content: bytes, random: Random) -> bytes:
    start, end = place(content, random)
    return content[:end] + content[start:]


def overwrite(content: bytes, random: Random) -> bytes:
    """As a disk sector that was lost."""
    start, end = place(content, random)
    return content[:start] + random.choice((bytes(end - start), random.randbytes(end - start))) + content[end:]


def place(content: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(content))
    return start, min(len(content), start + random.choice((1, 4, 64, 512)))


def swap_lines(content: bytes, random: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    a, b = (random.randrange(len(lines)) for _ in range(2))
    lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def drop_line(content: bytes, random: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[random.randrange(len(lines))]
    return b"".join(lines)


def insert_word(content: bytes, random: Random) -> bytes:
    start, _ = place(content, random)
    return content[:start] + random.choice(WORDS) + content[start:]


def replace_value(content: bytes, random: Random) -> bytes:
    """Another value for a key."""
    values = list(re.finditer(VALUE, content))
    if not values:
        return insert_word(content, random)
    value = random.choice(values)
    return content[: value.start()] + random.choice(WORDS) + content[value.end() :]
