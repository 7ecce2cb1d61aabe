"""MHA, GQA and MQA are one thing: shared key heads are equal key heads."""

import pytest
import torch

from mla_lm.attention import MHA, MHAConfig


def test_as_many_key_heads_as_heads_is_mha():
    torch.manual_seed(0)
    mha, gqa = MHA(MHAConfig(32, 4, 16)), MHA(MHAConfig(32, 4, 16, num_kv_heads=4))
    gqa.load_state_dict(mha.state_dict())
    x = torch.randn(2, 16, 32)
    assert torch.equal(mha(x), gqa(x))
    assert mha.new_cache(2, 16).nbytes == gqa.new_cache(2, 16).nbytes


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_shared_key_heads_are_mha_with_repeated_ones(num_kv_heads):
    torch.manual_seed(0)
    grouped, mha = MHA(MHAConfig(32, 4, 16, num_kv_heads=num_kv_heads)), MHA(MHAConfig(32, 4, 16))
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].unflatten(0, (num_kv_heads, 8))
        state[name] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    mha.load_state_dict(state)
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(grouped(x), mha(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_part_of_each_head_is_rotated():
    """Where the rotated part of q or k is zero, attention has no positions; the first pairs are that part."""
    torch.manual_seed(0)
    layer, x = MHA(MHAConfig(32, 4, 16, rope_dim=2)).eval(), torch.randn(1, 16, 32)
    swapped = x[:, [*range(7), 8, 7, *range(9, 16)]]
    assert (layer(x)[:, -1] - layer(swapped)[:, -1]).abs().max() > 1e-4
    layer.k_proj.weight.unflatten(0, (4, 8))[:, [0, 4]] = 0  # the pair (i, i + D/2) with i = 0
    torch.testing.assert_close(layer(x)[:, -1], layer(swapped)[:, -1], rtol=1e-5, atol=1e-6)


def test_the_whole_head_is_the_default():
    assert MHAConfig(32, 4, 16).rope_dim == 8
    whole, given = MHA(MHAConfig(32, 4, 16)).rope, MHA(MHAConfig(32, 4, 16, rope_dim=8)).rope
    assert torch.equal(whole.cos, given.cos)


@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_order_dropout_and_length(num_kv_heads):
    torch.manual_seed(0)
    layer, x = MHA(MHAConfig(32, 4, 8, num_kv_heads=num_kv_heads, dropout=0.5)), torch.randn(1, 8, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (layer(x)[:, -1] - layer(x[:, [2, 0, 1, 5, 3, 6, 4, 7]])[:, -1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="9 tokens is longer than seq_len=8"):
        layer(torch.randn(1, 9, 32))
