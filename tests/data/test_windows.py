"""Windows and their order, as properties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_lm.attention.documents import Documents
from mla_lm.data.windows import (
    EvaluationWindows,
    Order,
    StepBatchSampler,
    Windows,
    most_documents,
    places_in_block,
)
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


# order


def run_of(sizes, weights, seed, windows, sequences=7):
    """The first so many windows of a run, step by step."""
    order = Order(sizes, weights, seed)
    steps = -(-windows // sequences)
    return np.concatenate([order.of_step(step, sequences) for step in range(steps)])[:windows].tolist()


@given(size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1), sequences=st.integers(1, 20))
def test_one_corpus_is_taken_in_passes_each_in_an_order_of_its_own(size, seed, sequences):
    passes = []
    for number in range(3):
        bits = np.random.MT19937(np.random.SeedSequence((seed, number)))
        passes += np.random.RandomState(bits).permutation(size).tolist()
    assert run_of([size], [1.0], seed, 3 * size, sequences) == passes


def test_passes_and_seeds_have_orders_of_their_own():
    run = run_of([50], [1.0], 1, 100)
    assert run[:50] != run[50:]
    assert run[:50] != run_of([50], [1.0], 2, 50)
    assert run[:50] != list(range(50))


def test_the_order_is_for_ever():
    """Runs are resumed with other versions of NumPy and torch: these numbers may never change."""
    assert Order([10], [1.0], seed=7).of_step(2, 4).tolist() == [2, 3, 8, 6]
    assert Order([10, 3, 20], [0.5, 0.2, 0.3], seed=7).of_step(300, 8).tolist() == [2, 9, 26, 29, 16, 7, 4, 15]


@st.composite
def mixtures(draw):
    parts = draw(st.integers(2, 5))
    shares = draw(st.lists(st.integers(10, 1000), min_size=parts, max_size=parts))
    sizes = draw(st.lists(st.integers(1, 60), min_size=parts, max_size=parts))
    return sizes, [weight / sum(shares) for weight in shares]


@given(mixtures(), st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_in_every_block_each_part_has_its_share_and_is_taken_in_passes(mixture, seed):
    sizes, weights = mixture
    run = np.array(run_of(sizes, weights, seed, 2000))
    first = 0
    for size, weight in zip(sizes, weights, strict=True):
        is_of_part = (run >= first) & (run < first + size)
        shares = is_of_part.reshape(2, 1000).sum(1)
        assert shares[0] == shares[1]
        assert abs(shares[0] - 1000 * weight) < 1 + 1e-6
        windows = run[is_of_part] - first
        passes = [windows[start : start + size].tolist() for start in range(0, len(windows), size)]
        for whole in passes[:-1]:
            assert sorted(whole) == list(range(size))
        assert len(set(passes[-1])) == len(passes[-1])
        if size > 20 and len(passes) > 2:
            assert passes[0] != passes[1]
        first += size
    assert run.max() < first


def test_blocks_and_parts_have_orders_of_their_own():
    run = np.array(run_of([100, 100], [0.5, 0.5], 3, 3000))
    blocks = (run < 100).reshape(3, 1000)
    assert not (blocks[0] == blocks[1]).all()
    assert 0.4 < (blocks[0] == blocks[1]).mean() < 0.6
    assert blocks[0].reshape(10, 100).mean(1).min() > 0.3  # mixed within the block, too
    assert run[run < 100].tolist() != (run[run >= 100] - 100).tolist()


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    share=st.integers(1, 6),
    world_size=st.integers(1, 4),
    max_steps=st.integers(1, 12),
    data=st.data(),
)
def test_steps_do_not_depend_on_where_they_start_or_on_the_devices(sizes, share, world_size, max_steps, data):
    sequences = share * world_size
    start = data.draw(st.integers(0, max_steps))

    def sampler(*rest):  # each device draws the order anew
        return StepBatchSampler(Order(sizes, [1 / len(sizes)] * len(sizes), 3), sequences, max_steps, *rest)

    alone = list(sampler())
    ranks = [sampler(start, rank, world_size) for rank in range(world_size)]
    assert [len(sampler) for sampler in ranks] == [max_steps] * world_size
    assert list(itertools.chain(*alone)) == run_of(sizes, [1 / len(sizes)] * len(sizes), 3, max_steps * sequences, 1)
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == max_steps - start
    for step, batches in enumerate(steps, start):
        assert [len(batch) for batch in batches] == [share] * world_size
        assert sorted(itertools.chain(*batches)) == sorted(alone[step])


def test_largest_remainders_fill_a_block():
    assert places_in_block([1 / 3, 1 / 3, 1 / 3]) == [334, 333, 333]
    assert places_in_block([0.7, 0.29, 0.01]) == [700, 290, 10]
    assert places_in_block([0.9974, 0.0016, 0.001]) == [997, 2, 1]


def test_a_split_shorter_than_a_window_is_named():
    with pytest.raises(UserError, match=r"train split has 16 tokens.*model\.seq_len=16"):
        Windows(ids(16), 16)
    assert len(Windows(ids(17), 16)) == 1
    with pytest.raises(UserError, match="test split has 1 tokens"):
        EvaluationWindows(ids(1), 16, split="test")


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([(12, 12), (12, 4), (12, 1), (1, 1)]),
    st.sampled_from([1, 2, 10, 1000]),
    st.integers(0, 2**32 - 1),
)
def test_documents_are_counted_as_the_model_finds_them(micro_batches, together, sizes, vocab_size, seed):
    seq_len, length = sizes
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(vocab_size, (micro_batches * together, seq_len + 1), generator=generator)
    before = windows.clone()
    counts = [
        len(Documents.find(part[:, :-1].reshape(-1, length), document_token=0).lengths)
        for part in windows.split(together)
    ]
    most = most_documents(windows, 0, length, together)
    assert torch.equal(windows, before)
    assert max(counts) <= most < 2 * max(counts)
    assert most.bit_count() == 1
