"""Attention within documents: the same as documents that are passed through by themselves."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from mla_lm import AttentionConfig, Transformer
from mla_lm.attention import KINDS, documents
from mla_lm.attention.documents import Documents, takes_all_at_once
from tests import varlen_attention  # noqa: F401 - the kernel of a GPU, for a CPU
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
    padded = Documents.find(windows("0170112", "7707000"), END, most=8)
    assert padded.starts.tolist() == [0, 2, 7, 8, 10, 14, 14, 14, 14]
    assert padded.lengths == found.lengths
    assert torch.equal(padded.positions, found.positions)


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


@pytest.fixture
def all_at_once(monkeypatch) -> list[int]:
    """Take the kernel of a GPU for all documents at once; returns the head sizes that attention asked it for."""
    asked = []

    @torch.compiler.assume_constant_result
    def always(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        asked.append(head_dim)
        return True

    monkeypatch.setattr(documents, "takes_all_at_once", always)
    return asked


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(8, 8, 4, 4), (12, 8, 4, 4), (8, 12, 4, 2), (5, 3, 4, 1), (24, 16, 2, 2)], ids=str)
def test_all_at_once_gives_what_one_by_one_does(request, sizes):
    dim, value_dim, heads, kv_heads = sizes
    q = torch.randn(2, heads, 7, dim).bfloat16()
    k, v = torch.randn(2, kv_heads, 7, dim).bfloat16(), torch.randn(2, kv_heads, 7, value_dim).bfloat16()
    expected = documents.document_attention(q, k, v, 0.3, Documents.find(windows("0170112", "7707000"), END))
    asked = request.getfixturevalue("all_at_once")
    for most in (5, 8):
        found = Documents.find(windows("0170112", "7707000"), END, most)
        out = documents.document_attention(q, k, v, 0.3, found)
        assert out.shape == (2, heads, 7, value_dim)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    assert asked == 2 * [max(dim, value_dim)]


def training_pass(model: Callable, tokens: torch.Tensor, most: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and its gradients."""
    loss = model(tokens[:, :-1], tokens[:, 1:], most_documents=most)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=10)
@given(rows=st.lists(st.text("01234577", min_size=25, max_size=25), min_size=2, max_size=3), share=st.floats(0, 1))
def test_counted_before_they_give_the_same_to_the_bit(kind, rows, share):
    model, tokens = model_of(kind), windows(*rows)
    count = len(Documents.find(tokens[:, :-1], END).lengths)
    loss, gradients = training_pass(model, tokens, None)
    again, others = training_pass(model, tokens, count + int(share * 40))
    assert torch.equal(again, loss)
    assert all(map(torch.equal, others, gradients))


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_at_once_trains_as_one_by_one_does(request, kind):
    model, tokens = model_of(kind), windows("1234574321" * 2 + "00000", "0123774567012370123456012")
    loss, gradients = training_pass(model, tokens, None)
    asked = request.getfixturevalue("all_at_once")
    for most in (None, 16):
        ours, others = training_pass(model, tokens, most)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    assert set(asked) == {model.config.layer_config().head_dim}


@pytest.mark.parametrize(("kind", "checkpointing"), [("mla", False), ("mla", True), ("gqa", False)])
def test_all_at_once_compiles_to_few_graphs(request, kind, checkpointing):
    """Whatever documents a batch has, two graphs serve: for the first number of them, and for any other."""
    model = model_of(kind, activation_checkpointing=checkpointing)
    none, few, many = (
        windows("0" * 25, "1" * 25),
        windows("1234574321" * 2 + "00000", "0" * 25),
        windows(*2 * ["7" * 25]),
    )
    batches = [(none, 2), (few, 4), (many, 64), (few, 8), (none, 2)]
    expected = [training_pass(model, tokens, None) for tokens, _ in batches]
    request.getfixturevalue("all_at_once")
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
    for (tokens, most), (loss, gradients) in zip(batches, expected, strict=True):
        ours, others = training_pass(compiled, tokens, most)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2
    torch.compile(model.hidden_states, backend="aot_eager", fullgraph=True)(few[:, :-1], most_documents=8)


def test_what_takes_documents_is_a_constant_of_a_compiled_graph():
    torch.compiler.reset()
    asks = torch.compile(lambda q: -q if takes_all_at_once(q.device, q.dtype, q.size(-1)) else q, fullgraph=True)
    assert asks(torch.ones(3, 4)).tolist() == torch.ones(3, 4).tolist()


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
