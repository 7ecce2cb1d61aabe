"""Near-copies: what is found to copy or repeat other text, and what is not."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.data.near_copies import RUN, near_copies, runs

WORDS = [f"word{letter}{other}" for letter in "abcdefghij" for other in "abcdefghij"]


def prose(seed, words=200):
    """Random words, eight to a line."""
    chosen = random.Random(seed).choices(WORDS, k=words)
    return "\n".join(" ".join(chosen[i : i + 8]) for i in range(0, words, 8))


def windows(text):
    words = re.findall(r"[A-Za-z_][A-Za-z_0-9]*", text)
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


@given(st.lists(st.sampled_from("ab"), min_size=RUN, max_size=60), st.lists(st.sampled_from("ab"), min_size=RUN))
def test_two_texts_share_as_many_runs_as_windows_of_words(first, second):
    first, second = " ".join(first), " ".join(second)
    assert len(runs(first)) == len(windows(first))
    assert len(np.intersect1d(runs(first), runs(second))) == len(windows(first) & windows(second))


def test_a_short_text_is_one_run():
    assert runs("").shape == runs("one, two").shape == (1,)
    assert runs("one, two") == runs("one two  3")
    assert runs("one, two") != runs("two, one")


SOURCE = "\n".join(
    f"def {a}(x, y):\n    return {b}(x[{i}]) + {c}"
    for i, (a, b, c) in enumerate(zip(WORDS[:33], WORDS[33:66], WORDS[66:99], strict=True))
)


@pytest.mark.parametrize(
    "copy",
    [
        SOURCE,
        "import other\n\n" + SOURCE.replace("    ", "\t"),
        SOURCE.replace("(x, y)", "(\n    x,\n    y,\n)").replace("[", "[-").replace("1", "2"),
        re.sub(r"(?m)^def (word[a-e]\w+)", r"def new_\1", SOURCE, count=5),
        prose(1, 5000) + SOURCE[len(SOURCE) // 2 :][:400] + prose(2, 5000),
    ],
    ids=["whole", "indented", "reformatted", "changed", "a part in a long text"],
)
def test_a_copy_of_held_out_text_is_found(copy):
    copied, repeated = near_copies([prose(3), copy, prose(4)], [prose(5), SOURCE])
    assert copied.tolist() == [False, True, False]
    assert not repeated.any()


def test_text_that_shares_fewer_words_than_a_run_is_no_copy():
    phrase = " ".join(WORDS[: RUN - 1])
    copied, _ = near_copies(
        [f"{prose(1)} new1 {phrase} new2", f"{prose(2)} {phrase} {WORDS[RUN - 1]}"], [SOURCE, prose(9)]
    )
    assert copied.tolist() == [False, False]
    held_out = [f"{prose(3)} other1 {' '.join(WORDS[:RUN])} other2"]
    copied, _ = near_copies([f"{prose(1)} new1 {phrase} new2", f"{prose(2)} {phrase} {WORDS[RUN - 1]}"], held_out)
    assert copied.tolist() == [False, True]


def test_of_texts_that_repeat_each_other_the_first_stays():
    first, second = prose(1), prose(2)
    longer = f"{first} {prose(3, 50)}"
    half_new = f"{first[: len(first) // 3]} {prose(4)}"
    _, repeated = near_copies([first, second, longer, half_new, second.replace(" ", "\n"), "x", "x"], [prose(5)])
    assert repeated.tolist() == [False, False, True, False, True, False, True]
