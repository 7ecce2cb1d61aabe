"""MLA with norms of queries and keys: by its equations, and absorbed as decompressed."""

import pytest
import torch
from torch import nn

from mla_lm.attention import rotate
from mla_lm.attention.mla_qk_norm import QKNormMLA, QKNormMLAConfig


def small(**changes) -> QKNormMLA:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "kv_compressed_dim": 12, "q_compressed_dim": None, "rope_dim": 4}
    layer = QKNormMLA(QKNormMLAConfig(**{**sizes, "seq_len": 16, "nope_dim": 6, "value_dim": 5, **changes})).eval()
    for parameter in (layer.q_head_norm.weight, layer.k_head_weight):
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    return layer


def test_equations():
    """The norms as PyTorch's own, over whole heads, head by head and token by token, in fp64."""
    layer, h = small().double(), torch.randn(5, 32, dtype=torch.float64)
    cos, sin = (t.double() for t in layer.rope(0, 5))
    rms = lambda x, weight: nn.functional.rms_norm(x, (x.size(-1),), weight, eps=1e-6)  # noqa: E731
    rope = lambda x: torch.cat((x[:, :6], rotate(x[None, :, None, 6:], cos, sin)[0, :, 0]), 1)  # noqa: E731
    down = h @ layer.kv_down.weight.T
    latent = rms(down[:, :12], layer.kv_norm.weight)
    heads = []
    for i in range(4):
        w_uk, w_uv = layer.kv_up.weight[i * 11 : (i + 1) * 11].split((6, 5))
        q = rope(rms(h @ layer.q_proj.weight[i * 10 : (i + 1) * 10].T, layer.q_head_norm.weight))
        k = rope(rms(torch.cat((latent @ w_uk.T, down[:, 12:]), 1), layer.k_head_weight))
        weights = [torch.softmax(k[: t + 1] @ q[t] / 10**0.5, 0) for t in range(5)]
        heads.append(torch.stack([w @ (latent @ w_uv.T)[: t + 1] for t, w in enumerate(weights)]))
    expected = torch.cat(heads, 1) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(h[None])[0], expected, rtol=1e-6, atol=1e-7)  # RoPE's table is fp32


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("changes", [{}, {"rope_dim": 0}, {"q_compressed_dim": 8, "latent_scale": True}])
@torch.no_grad()
def test_absorbed_equals_decompressed(absorb, changes):
    layer, x = small(**changes), torch.randn(2, 9, 32)
    layer.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = layer.new_cache(2, 9)
    out = torch.cat([layer(part, cache) for part in x.split([4, 1, 3, 1], dim=1)], dim=1)
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
    assert cache.nbytes == 2 * 9 * layer.config.cached_elements * 4


def test_scores_do_not_depend_on_the_scale_of_queries_and_keys():
    layer, x = small(), torch.randn(2, 9, 32)
    before = layer(x)
    with torch.no_grad():
        layer.q_proj.weight.mul_(100)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
