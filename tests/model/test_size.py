"""Counted from a configuration against measured on the model it builds."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mla_lm import AttentionConfig, Transformer, TransformerConfig, UserError
from mla_lm.model.size import model_size, same_size_as
from tests.kinds import preset_of

MLA = AttentionConfig(kind="mla", kv_compressed_dim=16, q_compressed_dim=12, rope_dim=4, nope_dim=4)
CONFIG = TransformerConfig(num_layers=3, d_model=32, num_heads=4, seq_len=16, ff_hidden=48, vocab_size=61)


def counted(model, tokens, backend) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
        model(tokens, tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["mla_small", "mha_small", "gqa_small", "mqa_small", "mla_serving"])
def test_flops_of_the_presets(name):
    """On tensors without data, by the same two counts; mla_serving has heads of 192 for queries and 128 for values."""
    config = replace(preset_of(name), num_layers=2, vocab_size=4096)
    with FakeTensorMode():
        model, tokens = Transformer(config), torch.zeros(2, config.seq_len, dtype=torch.long)
        others = counted(model, tokens, SDPBackend.FLASH_ATTENTION)
        attended = counted(model, tokens, SDPBackend.MATH) - others
    layer = model.blocks[0].attention
    qk_dim, value_dim = (layer.qk_dim, layer.config.value_dim) if "mla" in name else (layer.head_dim, layer.head_dim)
    kernel = 2 * max(qk_dim, value_dim) * 2 * config.seq_len  # of the padded heads, and of all pairs of places
    needed = (qk_dim + value_dim) * (config.seq_len + 1)
    assert model_size(config).flops_per_token * tokens.numel() == others + attended * needed / kernel


def test_padding_of_unequal_heads_is_not_counted():
    # nope_dim + rope_dim = 12 against value_dim = 8: the kernel gets 12 and 12, of which 12 + 8 are needed.
    config = replace(CONFIG, attention=AttentionConfig(kind="mla", kv_compressed_dim=16, rope_dim=4))
    model, tokens = Transformer(config), torch.randint(61, (2, 16))
    others = counted(model, tokens, SDPBackend.FLASH_ATTENTION)
    attended = counted(model, tokens, SDPBackend.MATH) - others
    assert model_size(config).flops_per_token * tokens.numel() == others + attended * 20 * 17 / (24 * 32)


def test_a_model_too_large_to_allocate():
    attention = AttentionConfig(
        kind="mla", kv_compressed_dim=512, q_compressed_dim=1536, rope_dim=64, nope_dim=128, value_dim=128
    )
    size = model_size(TransformerConfig(60, 16384, 128, 1024, 65536, attention, vocab_size=100_000))
    assert size.parameters > 200e9
    assert size.cache_elements_per_token_per_layer == 576  # section 2.1.4


def test_peers():
    sizes = same_size_as(replace(CONFIG, num_heads=8, attention=MLA))
    assert [s.attention for s in sizes] == ["mla", "mha", "gqa", "mqa"]
    assert [s.cache_elements_per_token_per_layer for s in sizes] == [20, 64, 16, 8]
    assert [s.attention for s in same_size_as(CONFIG)] == ["mha", "gqa", "mqa"]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 9, 10, 14, 18])
def test_peers_exist_for_any_number_of_heads(num_heads):
    sizes = same_size_as(replace(CONFIG, d_model=4 * num_heads, num_heads=num_heads, attention=MLA))
    assert {"mla", "mha"} <= {s.attention for s in sizes}


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match="not divisible"):
        model_size(replace(CONFIG, d_model=30))
