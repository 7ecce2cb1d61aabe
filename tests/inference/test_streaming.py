"""A continuation's text, decoded piece by piece, is that of all its ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from mla_lm.data.config import TokenizerConfig
from mla_lm.data.tokenizer import build_tokenizer, decode, encode
from mla_lm.inference import streaming
from mla_lm.inference.streaming import Continuation

TEXT = "def é(日本語, 👩‍👩‍👧):\n    return 'a<e|<end|é<endé'\n"
BYTE_LEVEL = {
    "bpe": build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=320), [TEXT] * 3),
    "bytes": build_tokenizer(TokenizerConfig(kind="bytes"), []),
}


def like_sentencepiece() -> Tokenizer:
    """As Llama's: a space before the text, which decoding drops; what it does not know byte by byte."""
    vocabulary = ["<unk>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    entries = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(entries, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(space)
    return tokenizer


def growing(tokenizer: Tokenizer, prompt: list[int], room: int, stops: tuple[str, ...] = ()) -> Continuation:
    return Continuation(tokenizer, prompt, end=-1, room=room, stops=list(stops))


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(st.data())
@settings(max_examples=60)
def test_any_ids(kind, data):
    """Also those of no text: characters begun and never ended, and ids that no token has."""
    tokenizer = BYTE_LEVEL[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 5), min_size=1, max_size=40))
    prompt = encode(tokenizer, data.draw(st.sampled_from(["", "a", TEXT])))
    text, shown = growing(tokenizer, prompt, len(ids)), ""
    for i, token in enumerate(ids, start=1):
        text.add(token)
        whole = decode(tokenizer, prompt + ids[:i])
        assert text.text == whole
        assert text.settled.startswith(shown)
        shown = text.settled
        assert shown == whole.rstrip(streaming.NOT_WHOLE)
    assert text.done


@given(st.text("a \né日", min_size=1), st.integers(0, 3))
@settings(max_examples=100)
def test_a_tokenizer_that_drops_the_first_space(text, prompt_length):
    tokenizer = like_sentencepiece()
    ids = tokenizer.encode(text).ids
    continued = growing(tokenizer, ids[:prompt_length], len(ids))
    for token in ids[prompt_length:]:
        continued.add(token)
    assert continued.text == decode(tokenizer, ids)


def test_a_long_text_is_not_decoded_over_and_over(monkeypatch):
    tokenizer, decoded = BYTE_LEVEL["bpe"], []
    monkeypatch.setattr(streaming, "decode", lambda tokenizer, ids: decoded.append(len(ids)) or decode(tokenizer, ids))
    ids = encode(tokenizer, TEXT * 20)
    text = growing(tokenizer, [], len(ids))
    for token in ids:
        text.add(token)
    assert text.settled == TEXT * 20
    assert sum(decoded) < 30 * len(ids)


def test_what_may_begin_a_stop_string_is_held_back():
    """Shown as soon as it is sure, lost never, whatever the tokens are cut into."""
    tokenizer, wanted, shown = BYTE_LEVEL["bpe"], "a<e|<end|é<endé", ""
    ids = encode(tokenizer, wanted)
    text = growing(tokenizer, [], len(ids), ("<end>", "é<end|"))
    for token in ids:
        text.add(token)
        assert text.settled.startswith(shown)
        assert wanted.startswith(text.settled)
        shown = text.settled
        rest = wanted[len(shown) :] if text.done else text.text.rstrip(streaming.NOT_WHOLE)[len(shown) :]
        assert any(stop.startswith(rest) for stop in text.stops)
    assert text.done
    assert shown == wanted
