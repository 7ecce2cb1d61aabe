"""Sizes that cannot be are refused with a text that names them."""

import pytest

from mla_lm import UserError
from mla_lm.attention import MHAConfig, MLAConfig

MLA_SIZES = {
    "d_model": 64,
    "num_heads": 4,
    "kv_compressed_dim": 16,
    "q_compressed_dim": 8,
    "rope_dim": 8,
    "seq_len": 32,
}
MHA_SIZES = {"d_model": 64, "num_heads": 4, "seq_len": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_dim": 7}, "rope_dim=7 must be even"),
        ({"rope_dim": -2}, "rope_dim=-2 must be even, as rotation works on pairs, and at least 0"),
        ({"init": "xavier"}, "init=xavier is unknown: normal or fan_in"),
        ({"d_model": 66}, "d_model=66 is not divisible by num_heads=4"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"d_model": -64}, "d_model=-64 must be at least 1"),
        ({"kv_compressed_dim": 0}, "kv_compressed_dim=0 must be at least 1"),
        ({"q_compressed_dim": 0}, "q_compressed_dim=0 must be at least 1"),
        ({"nope_dim": 0}, "nope_dim=0 must be at least 1"),
        ({"value_dim": -1}, "value_dim=-1 must be at least 1"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
    ],
)
def test_mla_refuses(change, message):
    with pytest.raises(UserError, match=message):
        MLAConfig(**{**MLA_SIZES, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 66}, "d_model=66 is not divisible by num_heads=4"),
        ({"d_model": 12}, "must be even for RoPE"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads=4 is not divisible by num_kv_heads=8"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1"),
        ({"rope_dim": 7}, "rope_dim=7 must be even"),
        ({"rope_dim": 18}, "rope_dim=18 must be .* at most the d_model / num_heads = 16 of a head"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
    ],
)
def test_mha_refuses(change, message):
    with pytest.raises(UserError, match=message):
        MHAConfig(**{**MHA_SIZES, **change})


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="rope_dim"):
        MLAConfig(64, 4, 16, None, 3, 32)
