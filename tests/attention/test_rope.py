"""Rotary embedding: scores depend on distance alone, and the table survives every move of the module."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_lm import UserError
from mla_lm.attention import MHA, MLA, MHAConfig, MLAConfig, RotaryEmbedding, YarnConfig, rotate


@settings(max_examples=25)
@given(st.integers(1, 16), st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**31))
def test_scores_depend_on_the_distance_alone(half, m, n, shift, seed):
    torch.manual_seed(seed)
    rope = RotaryEmbedding(2 * half, 1001)
    q, k = torch.randn(2, 1, 1, 1, 2 * half)
    score = lambda m, n: (rotate(q, *rope(m, 1)) * rotate(k, *rope(n, 1))).sum()  # noqa: E731
    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), rtol=1e-4, atol=1e-4)


def test_angles():
    cos, sin = RotaryEmbedding(4, 8, base=100.0)(0, 8)
    position = torch.arange(8.0)
    torch.testing.assert_close(cos, torch.stack((position.cos(), (position / 10).cos()), dim=1))
    torch.testing.assert_close(sin, torch.stack((position.sin(), (position / 10).sin()), dim=1))


def test_rotation_keeps_length_and_dtype_and_position_zero():
    rope, x = RotaryEmbedding(8, 64), torch.randn(2, 64, 3, 8)
    turned = rotate(x, *rope(0, 64))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert rotate(x.bfloat16(), *rope(0, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), copy.deepcopy]
)
def test_table_stays_fp32_and_exact(move):
    original = RotaryEmbedding(8, 64)
    moved = move(copy.deepcopy(original))
    for before, after in zip(original(0, 64), moved(0, 64), strict=True):
        assert after.dtype == torch.float32
        assert torch.equal(before, after)


def test_from_the_meta_device():
    with torch.device("meta"):
        rope = RotaryEmbedding(8, 64)
    assert rope.cos.is_meta
    rope.to_empty(device="cpu")
    assert torch.equal(rope.cos, RotaryEmbedding(8, 64).cos)
    assert not rope.state_dict()


def test_a_position_past_the_end():
    rope = RotaryEmbedding(8, 64)
    assert rope(63, 1)[0].shape == (1, 4)
    with pytest.raises(ValueError, match="65 tokens is longer than seq_len=64"):
        rope(64, 1)


def test_yarn_slows_the_slow_pairs_only():
    """Trained on 256 positions, 16 pairs: the first turns 41 times in them, the last not once."""
    plain, slowed = (RotaryEmbedding(32, 1024, 10000.0, yarn) for yarn in (YarnConfig(), YarnConfig(factor=4.0)))
    at_one = [rope(1, 1) for rope in (plain, slowed)]
    angles = [torch.atan2(sin, cos).squeeze(0).double() for cos, sin in at_one]
    ratio = angles[0] / angles[1]
    torch.testing.assert_close(ratio[:1], torch.ones(1, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[7:], torch.full((9,), 4.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (ratio.diff() > -1e-4).all()


def test_yarn_with_factor_one_is_plain_rope():
    plain, yarn = RotaryEmbedding(8, 64), RotaryEmbedding(8, 64, yarn=YarnConfig(mscale=0.5, original_seq_len=16))
    assert torch.equal(plain.cos, yarn.cos)
    assert YarnConfig(mscale_all_dim=0.3).score_scale == 1


@pytest.mark.parametrize(
    ("yarn", "named"),
    [
        (YarnConfig(factor=0.5), "factor=0.5"),
        (YarnConfig(factor=float("nan")), "factor=nan"),
        (YarnConfig(original_seq_len=0), "original_seq_len=0"),
        (YarnConfig(beta_fast=1.0), "beta_slow=1.0"),
    ],
)
def test_yarn_that_cannot_be(yarn, named):
    with pytest.raises(UserError, match=named):
        MLA(MLAConfig(32, 4, 12, None, 4, 64, yarn=yarn))
    with pytest.raises(UserError, match=named):
        MHA(MHAConfig(32, 4, 64, yarn=yarn))
