"""Attention within documents: the same as documents that are passed through by themselves."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention.documents import Documents
from tests.attention.test_fused import BACKWARD, FORWARD, AttentionOps

END = 7  # which begins a document
KINDS = {
    "mla": AttentionConfig(kv_compressed_dim=12, rope_dim=4, nope_dim=4, value_dim=8),
    "mla of unequal heads": AttentionConfig(kv_compressed_dim=12, q_compressed_dim=10, rope_dim=4),
    "mha": AttentionConfig(),
    "gqa": AttentionConfig(num_kv_heads=2),
    "mqa": AttentionConfig(num_kv_heads=1),
}


def model_of(kind: str, document_token: int | None = END, **changes) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(2, 32, 4, 24, 48, KINDS[kind], vocab_size=8, document_token=document_token, **changes)
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


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
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


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_another_document_changes_nothing(kind):
    model, one = model_of(kind), windows("123457654321", "123457654321")
    other = copy.deepcopy(one)
    other[:, :5] = 0
    assert not torch.equal(model(one)[:, :5], model(other)[:, :5])
    torch.testing.assert_close(model(one)[:, 5:], model(other)[:, 5:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_a_document_gives_what_training_saw(kind):
    model = model_of(kind).eval()
    tokens = windows("123457654321")
    cache = model.new_cache(1)
    with torch.no_grad():
        decoded = torch.cat([model(token, cache=cache) for token in tokens[:, 5:].split(1, dim=1)], dim=1)
        torch.testing.assert_close(decoded, model(tokens)[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_for_every_document(kind):
    model = model_of(kind)
    with AttentionOps() as ops:
        model(windows("123457654321", "123412341234")).sum().backward()
    assert ops.names == [FORWARD] * 3 * 2 + [BACKWARD] * 3 * 2  # three documents, two layers
    assert ops.softmaxes == 0
