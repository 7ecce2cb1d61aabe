"""Windows and their order, as properties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_lm.data.windows import EvaluationWindows, StepBatchSampler, Windows, indices_of_step
from mla_lm.errors import UserError

IGNORE = -100
counts = st.integers(2, 300)
lengths = st.integers(1, 40)


def ids(count):
    return np.arange(count, dtype=np.uint16)  # each token tells its position


@given(counts, lengths)
def test_training_windows_predict_each_token_once(count, seq_len):
    if count <= seq_len:
        with pytest.raises(UserError):
            Windows(ids(count), seq_len)
        return
    windows = Windows(ids(count), seq_len)
    stacked = torch.stack([windows[i] for i in range(len(windows))])
    assert stacked.shape == ((count - 1) // seq_len, seq_len + 1)
    assert stacked.dtype == torch.int64
    assert stacked[:, 1:].flatten().tolist() == list(range(1, len(windows) * seq_len + 1))
    assert torch.equal(stacked[:, 1:], stacked[:, :-1] + 1)  # targets follow their inputs


@given(counts, lengths)
def test_evaluation_windows_predict_every_token_once(count, seq_len):
    windows = EvaluationWindows(ids(count), seq_len)
    stacked = torch.stack([windows[i] for i in range(len(windows))])
    inputs, targets = stacked[:, :-1], stacked[:, 1:]
    counted = targets != IGNORE
    assert targets[counted].tolist() == list(range(1, count))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    assert (stacked[:-1] != IGNORE).all()  # only the last is filled


@given(counts, lengths, st.integers(1, 400))
def test_a_capped_evaluation_takes_whole_windows_evenly(count, seq_len, max_tokens):
    every = EvaluationWindows(ids(count), seq_len)
    windows = EvaluationWindows(ids(count), seq_len, max_tokens)
    stacked = torch.stack([windows[i] for i in range(len(windows))])
    predicted = int((stacked[:, 1:] != IGNORE).sum())
    assert predicted <= max(max_tokens, seq_len)
    if max_tokens >= count - 1:
        assert predicted == count - 1
    elif count > seq_len:
        assert predicted == max(1, max_tokens // seq_len) * seq_len
        gaps = np.diff([*windows.indices, windows.indices[0] + (count - 1) // seq_len])
        assert gaps.min() >= 1
        assert np.ptp(gaps) <= 1
    assert all(torch.equal(windows[i], every[windows.indices[i]]) for i in range(len(windows)))


@given(
    windows=st.integers(1, 50),
    sequences=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    passes=st.integers(1, 3),
)
def test_each_window_once_a_pass(windows, sequences, seed, passes):
    steps = -(-windows * passes // sequences)
    order = np.concatenate([indices_of_step(step, sequences, windows, seed) for step in range(steps)])
    for number in range(passes):
        assert sorted(order[number * windows : (number + 1) * windows]) == list(range(windows))


def test_passes_and_seeds_have_orders_of_their_own():
    first, second = indices_of_step(0, 50, 50, seed=1), indices_of_step(1, 50, 50, seed=1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, indices_of_step(0, 50, 50, seed=2))
    assert not np.array_equal(first, np.arange(50))


def test_the_order_is_for_ever():
    """Runs are resumed with other versions of NumPy and torch: these numbers may never change."""
    assert indices_of_step(2, 4, 10, seed=7).tolist() == [2, 3, 8, 6]


@given(
    windows=st.integers(1, 50),
    share=st.integers(1, 6),
    world_size=st.integers(1, 4),
    max_steps=st.integers(1, 12),
    data=st.data(),
)
def test_steps_do_not_depend_on_where_they_start_or_on_the_devices(windows, share, world_size, max_steps, data):
    sequences = share * world_size
    start = data.draw(st.integers(0, max_steps))
    alone = list(StepBatchSampler(windows, sequences, max_steps, seed=3))
    ranks = [StepBatchSampler(windows, sequences, max_steps, 3, start, rank, world_size) for rank in range(world_size)]
    assert [len(sampler) for sampler in ranks] == [max_steps] * world_size
    assert len(alone) == max_steps
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == max_steps - start
    for step, batches in enumerate(steps, start):
        assert [len(batch) for batch in batches] == [share] * world_size
        assert sorted(itertools.chain(*batches)) == sorted(alone[step])
        assert sorted(alone[step]) == sorted(indices_of_step(step, sequences, windows, seed=3).tolist())


def test_a_split_shorter_than_a_window_is_named():
    with pytest.raises(UserError, match=r"train split has 16 tokens.*model\.seq_len=16"):
        Windows(ids(16), 16)
    assert len(Windows(ids(17), 16)) == 1
    with pytest.raises(UserError, match="test split has 1 tokens"):
        EvaluationWindows(ids(1), 16, split="test")
