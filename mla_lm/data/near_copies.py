"""Near-copies among texts, found by the runs of words that they share.

A word begins with a letter or an underscore; numbers, punctuation and white space are passed over, so a copy that was
only reformatted or renumbered has all the runs of its original, and an edit changes only the runs that go over it.
"""

import re
from collections.abc import Iterable

import numpy as np

RUN = 16  # words; among 8,000 files of packages and the standard library, runs of 8 are shared by idioms alone
REPEATED = 0.5  # share of a text's runs that occur in earlier texts, from which on it counts as their repetition

_WORD = re.compile(r"[^\W\d]\w*")
_FACTOR = 0x9E3779B97F4A7C15  # any odd number with many bits set


def runs(text: str) -> np.ndarray:
    """A hash of each run of `RUN` consecutive words in `text`, sorted and without duplicates, uint64 (count,).

    A shorter text counts as one run. The hashes differ from process to process, but which of them are equal does not
    (up to collisions: with 64 bits, less than one in a million for the largest corpus here).
    """
    hashes = np.fromiter(map(hash, _WORD.findall(text)), np.int64).view(np.uint64)
    hashes = np.pad(hashes, (0, max(0, RUN - len(hashes))))
    length, factor = 1, _FACTOR
    while length < RUN:  # hash of 2n words from those of n: the polynomial sum of factor**i * word i, modulo 2**64
        hashes = hashes[:-length] + np.uint64(factor) * hashes[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return np.unique(hashes)


def near_copies(texts: Iterable[str], held_out: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Find the texts that copy from held-out text, and those that repeat one another.

    Returns:
        bool (count,), whether a text has a run in common with any of `held_out`; and bool (count,), whether at least
        half of a text's runs occur in texts before it
    """
    forbidden = np.unique(np.concatenate([runs(text) for text in held_out]))
    found = [runs(text) for text in texts]
    copied = np.array([_is_in(of_text, forbidden).any() for of_text in found])
    sizes = np.array([len(of_text) for of_text in found])
    new = np.zeros(sizes.sum(), bool)
    new[np.unique(np.concatenate(found), return_index=True)[1]] = True  # return_index gives first occurrences
    first_of_text = np.cumsum(sizes) - sizes
    return copied, np.add.reduceat(new, first_of_text, dtype=np.int64) <= (1 - REPEATED) * sizes


def _is_in(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`np.isin` for a sorted table, which is not sorted again at each call."""
    return table[np.minimum(np.searchsorted(table, values), len(table) - 1)] == values
