"""Evaluation over windows, against computations that are plain and slow."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.data.windows import EvaluationWindows
from mla_lm.inference.evaluate import SlidingWindows, evaluate, metrics_of, sums_by_position, totals_of
from mla_lm.model.config import AttentionConfig, TransformerConfig
from mla_lm.model.transformer import Transformer

VOCAB, SEQ_LEN = 11, 8
BYTES = torch.tensor([0, *range(1, VOCAB)])


@pytest.fixture(scope="module")
def net() -> Transformer:
    torch.manual_seed(0)
    attention = AttentionConfig(kind="mla", kv_compressed_dim=8, rope_dim=4)
    config = TransformerConfig(
        num_layers=2, d_model=16, num_heads=2, seq_len=SEQ_LEN, ff_hidden=16, attention=attention, vocab_size=VOCAB
    )
    net = Transformer(config).eval()
    for parameter in net.parameters():
        parameter.data *= 5  # so that the context matters
    return net


def ids(count: int) -> np.ndarray:
    return np.random.RandomState(count).randint(0, VOCAB, count)


@given(count=st.integers(0, 100), seq_len=st.integers(1, 20), data=st.data())
def test_every_target_is_predicted_once_with_enough_context(count, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    windows = SlidingWindows(np.arange(count, dtype=np.uint16), seq_len, stride)  # each token tells its place
    predicted = []
    for index in range(len(windows)):
        window = windows[index]
        assert window.shape == (seq_len + 1,)
        assert window.dtype == torch.int64
        first = seq_len - stride if index else 0
        targets = window[1 + first :]
        predicted += targets[targets >= 0].tolist()
        assert index == 0 or targets[0] >= 0  # none is for nothing
        if index:
            assert targets[0] - window[0] > seq_len - stride  # tokens that it can see
    assert predicted == list(range(1, count))


def test_stride_of_one_is_token_by_token(net):
    tokens = ids(30)
    with torch.no_grad():
        losses = []
        for place in range(1, len(tokens)):
            context = torch.from_numpy(tokens[max(0, place - SEQ_LEN) : place])
            losses.append(F.cross_entropy(net(context[None])[0, -1], torch.tensor(tokens[place])).item())
    sums = evaluate(net, SlidingWindows(tokens, SEQ_LEN, 1), BYTES, batch_size=4)
    assert sums.sum(-1).tolist() == pytest.approx([sum(losses), 29, BYTES[tokens[1:]].sum().item()], rel=1e-6)
    assert sums[0, :-1].tolist() == pytest.approx(losses[: SEQ_LEN - 1], rel=1e-5)
    wide = evaluate(net, SlidingWindows(tokens, SEQ_LEN, SEQ_LEN), BYTES, batch_size=4)
    assert wide[0].sum().item() != pytest.approx(sum(losses), rel=1e-5)  # the context does matter here


@pytest.mark.parametrize("count", [2, SEQ_LEN + 1, 4 * SEQ_LEN + 1, 29])
def test_stride_of_a_window_is_the_plain_evaluation(net, count):
    tokens = ids(count)
    plain = EvaluationWindows(tokens, SEQ_LEN)
    with torch.no_grad():
        expected = totals_of(net, torch.stack([plain[i] for i in range(len(plain))]), BYTES)
    sums = evaluate(net, SlidingWindows(tokens, SEQ_LEN, SEQ_LEN), BYTES, batch_size=2)
    assert sums.sum(-1).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_sums_by_position_are_those_of_the_logits(net):
    batch = torch.from_numpy(ids(3 * (SEQ_LEN + 1))).view(3, SEQ_LEN + 1)
    batch[2, 5:] = -100
    with torch.no_grad():
        sums = sums_by_position(net, batch, BYTES)
        logits = net(batch[:, :-1].clamp(min=0))
        tail = sums_by_position(net, batch, BYTES, first=3)
    losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
    assert sums[0].tolist() == pytest.approx(losses.sum(0).tolist(), rel=1e-5)
    assert sums[1].tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert sums[2].sum().item() == BYTES[batch[:, 1:][batch[:, 1:] >= 0]].sum().item()
    assert tail.shape == (3, SEQ_LEN - 3)
    assert torch.allclose(tail, sums[:, 3:], rtol=1e-5)


def test_metrics():
    metrics = metrics_of(torch.tensor([20.0, 10.0, 40.0], dtype=torch.float64))
    assert metrics["loss"] == 2
    assert metrics["perplexity"] == pytest.approx(7.389056)
    assert metrics["bits_per_byte"] == pytest.approx(0.721348)  # 20 nats are 28.85 bits
