"""Multi-head Low-Rank Attention as several MLAs whose outputs are added."""

import pytest
import torch

from mla_lm import UserError
from mla_lm.attention import MLA, MLAConfig
from mla_lm.attention.mlra import MLRA, MLRAConfig

SIZES = {"d_model": 32, "num_heads": 4, "q_compressed_dim": None, "rope_dim": 4, "seq_len": 16, "value_dim": 5}


def small(**changes) -> MLRA:
    torch.manual_seed(0)
    return MLRA(MLRAConfig(**{**SIZES, "kv_compressed_dim": 12, **changes})).eval()


@pytest.mark.parametrize("latent_scale", [False, True])
@torch.no_grad()
def test_branches_are_mlas_with_the_same_queries(latent_scale):
    mlra, x = small(latent_scale=latent_scale), torch.randn(2, 9, 32)
    outs = []
    for j in range(4):
        mla = MLA(MLAConfig(**SIZES, kv_compressed_dim=3, latent_scale=latent_scale)).eval()
        mla.q_proj.weight.copy_(mlra.q_proj.weight)
        mla.kv_down.weight.copy_(torch.cat((mlra.kv_down.weight[3 * j : 3 * j + 3], mlra.kv_down.weight[12:])))
        mla.kv_up.weight.copy_(mlra.kv_up.parts[j].weight)
        mla.out_proj.weight.copy_(mlra.out_proj.weight)
        outs.append(mla(x))
    torch.testing.assert_close(mlra(x), sum(outs) / 2)


@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_absorbed_equals_decompressed(absorb):
    mlra, x = small(num_latent_heads=3), torch.randn(2, 9, 32)
    mlra.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = mlra.new_cache(2, 9)
    out = torch.cat([mlra(part, cache) for part in x.split([4, 1, 3, 1], dim=1)], dim=1)
    torch.testing.assert_close(out, mlra(x), rtol=1e-5, atol=1e-5)


def test_refuses_latents_of_unequal_width():
    with pytest.raises(UserError, match="kv_compressed_dim=12 is not divisible by num_latent_heads=5"):
        small(num_latent_heads=5)
