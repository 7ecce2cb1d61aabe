"""Grouped Latent Attention as two MLAs side by side, each with a latent and heads of its own."""

import pytest
import torch

from mla_lm import UserError
from mla_lm.attention import MLA, MLAConfig
from mla_lm.attention.gla import GLA, GLAConfig

SIZES = {"d_model": 36, "q_compressed_dim": None, "rope_dim": 4, "seq_len": 16, "nope_dim": 6, "value_dim": 5}


@pytest.mark.parametrize("latent_scale", [False, True])
@torch.no_grad()
def test_latent_heads_are_separate_mlas_that_share_the_rotated_key(latent_scale):
    torch.manual_seed(0)
    gla = GLA(GLAConfig(**SIZES, num_heads=4, kv_compressed_dim=12, latent_scale=latent_scale)).eval()
    x, outs = torch.randn(2, 9, 36), []
    for j in range(2):
        mla = MLA(MLAConfig(**SIZES, num_heads=2, kv_compressed_dim=6, latent_scale=latent_scale)).eval()
        mla.q_proj.weight.copy_(gla.q_proj.weight.chunk(2)[j])
        mla.kv_down.weight.copy_(torch.cat((gla.kv_down.weight[6 * j : 6 * j + 6], gla.kv_down.weight[12:])))
        mla.kv_up.weight.copy_(gla.kv_up.parts[j].weight)
        mla.out_proj.weight.copy_(gla.out_proj.weight.chunk(2, dim=1)[j])
        outs.append(mla(x))
    torch.testing.assert_close(gla(x), sum(outs))


@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_absorbed_equals_decompressed(absorb):
    torch.manual_seed(0)
    gla, x = GLA(GLAConfig(**SIZES, num_heads=6, kv_compressed_dim=12, num_latent_heads=3)), torch.randn(2, 9, 36)
    gla.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = gla.new_cache(2, 9)
    out = torch.cat([gla(part, cache) for part in x.split([4, 1, 3, 1], dim=1)], dim=1)
    torch.testing.assert_close(out, gla(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_latent_heads": 3}, "num_heads=4 is not divisible by num_latent_heads=3"),
        ({"kv_compressed_dim": 13}, "kv_compressed_dim=13 is not divisible by num_latent_heads=2"),
        ({"num_latent_heads": 0}, "num_latent_heads=0 must be at least 1"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(UserError, match=message):
        GLAConfig(**{**SIZES, "num_heads": 4, "kv_compressed_dim": 12, **change})
