"""Schedules as curves: where they begin, peak and end, whatever their options."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mla_lm import UserError
from mla_lm.optim.schedule import ScheduleConfig, lr_factor, mean_window_length, window_length

fractions = st.floats(0, 1)


@st.composite
def schedules(draw) -> ScheduleConfig:
    config = ScheduleConfig(draw(st.sampled_from(["cosine", "wsd"])), draw(fractions), draw(fractions), draw(fractions))
    assume(config.kind == "cosine" or config.warmup_fraction + config.decay_fraction <= 1)
    config.check()
    return config


def curve(config: ScheduleConfig, max_steps: int) -> list[float]:
    return [lr_factor(step, max_steps, config) for step in range(max_steps)]


@given(schedules(), st.integers(1, 300))
def test_rises_to_one_then_falls(config, max_steps):
    factors, warmup = curve(config, max_steps), round(config.warmup_fraction * max_steps)
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(set(rising))
    assert not rising or (rising[0] > 0 and rising[-1] == 1)
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))


@given(schedules(), st.integers(1, 300))
def test_ends_at_the_final_fraction(config, max_steps):
    decay = config.decay_fraction if config.kind == "wsd" else 1
    assume(round(config.warmup_fraction * max_steps) < max_steps and round(decay * max_steps) > 0)
    assert lr_factor(max_steps - 1, max_steps, config) == pytest.approx(config.final_lr_fraction)
    assert lr_factor(max_steps + 5, max_steps, config) == pytest.approx(config.final_lr_fraction)  # and stays there


def test_wsd_is_flat_between_warmup_and_decay():
    factors = curve(ScheduleConfig("wsd", warmup_fraction=0.1, decay_fraction=0.2, final_lr_fraction=0.0), 100)
    assert factors[9:80] == [1.0] * 71
    assert factors[0] == pytest.approx(0.1)
    assert factors[89] == pytest.approx(0.5)
    assert factors[80] < 1
    assert factors[99] == 0


def test_wsd_without_decay_stays_at_the_peak():
    assert curve(ScheduleConfig("wsd", warmup_fraction=0.0, decay_fraction=0.0), 10) == [1.0] * 10


def test_cosine_is_half_way_in_the_middle():
    factors = curve(ScheduleConfig("cosine", warmup_fraction=0.2, final_lr_fraction=0.2), 100)
    assert factors[19] == 1
    assert factors[59] == pytest.approx(0.6)
    assert factors[39] == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig(kind="linear"), "kind=linear is unknown: cosine or wsd"),
        (ScheduleConfig(warmup_fraction=1.5), "warmup_fraction=1.5 must lie between 0 and 1"),
        (ScheduleConfig(final_lr_fraction=-0.1), "final_lr_fraction=-0.1 must lie between 0 and 1"),
        (ScheduleConfig("wsd", warmup_fraction=0.6, decay_fraction=0.6), "add up to more than 1"),
    ],
)
def test_refused(config, message):
    with pytest.raises(UserError, match=message):
        config.check()


@given(fractions, st.integers(1, 300), st.sampled_from([None, 1, 4, 16, 64]))
def test_windows_are_short_first_and_never_longer_than_the_context(share, max_steps, short):
    config = ScheduleConfig(short_seq_len=short, short_fraction=share)
    lengths = [window_length(step, max_steps, 16, config) for step in range(max_steps)]
    assert lengths == sorted(lengths)
    assert set(lengths) <= {min(short or 16, 16), 16}
    assert mean_window_length(max_steps, 16, config) == pytest.approx(sum(lengths) / max_steps)
    if short in (1, 4):
        assert lengths.count(short) == round(share * max_steps)
