"""Attention within documents: the same as documents that are passed through by themselves."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mla_lm import AttentionConfig, Transformer
from mla_lm.attention import KINDS, documents
from mla_lm.attention.documents import Documents
from mla_lm.attention.sdpa import causal_attention
from tests.attention.test_sdpa import BACKWARD, FORWARD, AttentionOps
from tests.kinds import config_of

END = 7  # which begins a document
UNEQUAL = AttentionConfig(kind="mla", kv_compressed_dim=12, q_compressed_dim=10, rope_dim=4)  # heads of 36 and 32
CONFIGS = {kind: config_of(kind) for kind in KINDS} | {"mla of unequal heads": config_of("mla", attention=UNEQUAL)}


def model_of(kind: str, document_token: int | None = END, **changes) -> Transformer:
    torch.manual_seed(0)
    config = replace(CONFIGS[kind], seq_len=24, vocab_size=8, document_token=document_token, **changes)
    model = Transformer(config)
    for parameter in model.parameters():  # as they begin, attention would hardly matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def windows(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(token) for token in row] for row in rows])


def documents_of(row: list[int]) -> list[list[int]]:
    """Cut before every END but one at the very beginning, which begins the first document anyway."""
    cuts = [0, *(i for i, token in enumerate(row) if token == END and i > 0), len(row)]
    return [row[a:b] for a, b in itertools.pairwise(cuts)]


def test_where_documents_begin():
    found = Documents.find(windows("0170112", "7707000"), END)
    assert found.lengths == [2, 5, 1, 2, 4]
    assert found.starts.tolist() == [0, 2, 7, 8, 10, 14]
    assert found.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4], [0, 0, 1, 0, 1, 2, 3]]


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=15)
@given(
    rows=st.integers(1, 24).flatmap(
        lambda n: st.lists(st.text("0123457", min_size=n, max_size=n), min_size=1, max_size=3)
    )
)
def test_equal_to_separate_forward_passes(kind, rows):
    model, plain = model_of(kind), model_of(kind, document_token=None)
    tokens = windows(*rows)
    apart = [torch.cat([plain(torch.tensor([part]))[0] for part in documents_of(row)]) for row in tokens.tolist()]
    torch.testing.assert_close(model(tokens), torch.stack(apart), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_separate_passes(kind, checkpointing):
    model = model_of(kind, activation_checkpointing=checkpointing)
    plain = model_of(kind, document_token=None)
    rows = windows("1234574321", "7012337745")
    model(rows[:, :-1], rows[:, 1:]).backward()
    losses = []
    for row in rows.tolist():
        parts = documents_of(row[:-1])
        ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
        for part, end in zip(parts, ends, strict=True):
            targets = torch.tensor([row[end - len(part) + 1 : end + 1]])
            losses.append(plain(torch.tensor([part]), targets, reduction="none").flatten())
    torch.cat(losses).mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_document_changes_nothing(kind):
    model, one = model_of(kind), windows("123457654321", "123457654321")
    other = copy.deepcopy(one)
    other[:, :5] = 0
    assert not torch.equal(model(one)[:, :5], model(other)[:, :5])
    torch.testing.assert_close(model(one)[:, 5:], model(other)[:, 5:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_decoding_a_document_gives_what_training_saw(kind):
    model = model_of(kind).eval()
    tokens = windows("123457654321")
    cache = model.new_cache(1)
    with torch.no_grad():
        decoded = torch.cat([model(token, cache=cache) for token in tokens[:, 5:].split(1, dim=1)], dim=1)
        torch.testing.assert_close(decoded, model(tokens)[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_for_every_document(kind):
    model = model_of(kind)
    with AttentionOps() as ops:
        model(windows("123457654321", "123412341234")).sum().backward()
    assert ops.names == [FORWARD] * 3 * 2 + [BACKWARD] * 3 * 2  # three documents, two layers
    assert ops.softmaxes == 0


class KernelOfAGPU(TorchDispatchMode):
    """PyTorch's attention over documents of any lengths, which only a GPU has, with what it asks of its inputs."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() != "torch_attn::_varlen_attn":
            return func(*args, **(kwargs or {}))
        q, k, v, starts, key_starts, longest, longest_keys, causal, scale = args[:9]
        assert q.shape == k.shape == v.shape
        assert q.size(2) % 8 == 0
        assert q.size(2) <= 256
        assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        assert starts.dtype == torch.int32
        assert torch.equal(starts, key_starts)
        assert longest == longest_keys >= starts.diff().max()
        assert causal
        self.shapes.append(tuple(q.shape))
        lengths = starts.diff().tolist()
        parts = zip(*(t.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for t in (q, k, v)), strict=True)
        out = torch.cat([causal_attention(*part, scale) for part in parts], dim=2).squeeze(0).transpose(0, 1)
        return out, q.new_empty(q.size(1), q.size(0), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(8, 8, 4, 4), (12, 8, 4, 4), (8, 12, 4, 2), (5, 3, 4, 1), (24, 16, 2, 2)], ids=str)
def test_all_at_once_gives_what_one_by_one_does(monkeypatch, sizes):
    dim, value_dim, heads, kv_heads = sizes
    found = Documents.find(windows("0170112", "7707000"), END)
    q = torch.randn(2, heads, 7, dim).bfloat16()
    k, v = torch.randn(2, kv_heads, 7, dim).bfloat16(), torch.randn(2, kv_heads, 7, value_dim).bfloat16()
    expected = documents.document_attention(q, k, v, 0.3, found)
    monkeypatch.setattr(documents, "takes_all_at_once", lambda *_: True)
    with KernelOfAGPU() as kernel:
        out = documents.document_attention(q, k, v, 0.3, found)
    assert kernel.shapes == [(14, heads, -(-max(dim, value_dim) // 8) * 8)]
    assert out.shape == (2, heads, 7, value_dim)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


def test_the_kernel_is_given_a_form_that_it_has():
    """Names and order of its arguments, and that a gradient goes through, on tensors without data."""
    q = torch.empty(14, 4, 12, device="meta", dtype=torch.bfloat16, requires_grad=True)
    v = torch.empty(14, 2, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    starts = torch.empty(6, device="meta", dtype=torch.int32)
    out = documents._all_at_once(q, q[:, :2], v, 0.3, starts, 7)
    out.sum().backward()
    assert out.shape == (14, 4, 8)
    assert (q.grad.shape, v.grad.shape) == (q.shape, v.shape)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim"),
    [("cpu", torch.bfloat16, 64), ("cuda", torch.float32, 64), ("cuda", torch.bfloat16, 200)],
)
def test_where_there_is_no_kernel_for_all_at_once(device, dtype, head_dim):
    assert not documents.takes_all_at_once(torch.device(device), dtype, head_dim)
