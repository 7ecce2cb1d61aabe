"""What stands for characters that a terminal would obey."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mla_lm.terminal.plain_text import printable

BIDIRECTIONAL = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def test_printable():
    assert printable("a\x1b[2J\tb\r\n\x9b3\u202e\u2066\udcffc é日👩\u200d💻") == (
        r"a\x1b[2J\tb\r" + "\n" + r"\x9b3\u202e\u2066\udcffc é日" + "👩\u200d💻"
    )


@given(st.text(st.characters()))
def test_printable_changes_control_characters_only(text):
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n"]
    assert not [c for c in shown if unicodedata.bidirectional(c) in BIDIRECTIONAL]
    shown.encode()  # it can be written anywhere
    if all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in text):
        assert shown == text
