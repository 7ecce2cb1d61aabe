"""Grouped-Tied Attention, by its equations and against GQA's kernel."""

import pytest
import torch

from mla_lm import UserError
from mla_lm.attention import rotate
from mla_lm.attention.gta import GTA, GTAConfig


def test_equations():
    """Head by head and token by token, in fp64; four heads in two groups."""
    torch.manual_seed(0)
    gta = GTA(GTAConfig(32, 4, 16, num_kv_heads=2)).double().eval()
    h = torch.randn(5, 32, dtype=torch.float64)
    cos, sin = (t.double() for t in gta.rope(0, 5))
    rope = lambda x: rotate(x[None, :, None], cos, sin)[0, :, 0]  # noqa: E731
    k_rope = rope(h @ gta.k_rope_proj.weight.T)  # eq. 2
    heads = []
    for i in range(4):
        state = h @ gta.kv_proj.weight[(i // 2) * 8 : (i // 2 + 1) * 8].T  # eq. 1
        q = h @ gta.q_proj.weight[i * 8 : (i + 1) * 8].T
        q, k = torch.cat((q[:, :4], rope(q[:, 4:])), 1), torch.cat((state[:, :4], k_rope), 1)  # eq. 3
        weights = [torch.softmax(k[: t + 1] @ q[t] / 8**0.5, 0) for t in range(5)]
        heads.append(torch.stack([w @ state[: t + 1] for t, w in enumerate(weights)]))  # eq. 4
    expected = torch.cat(heads, 1) @ gta.out_proj.weight.T
    torch.testing.assert_close(gta(h[None])[0], expected, rtol=1e-6, atol=1e-7)  # RoPE's table is fp32


def test_a_head_that_cannot_be_halved():
    with pytest.raises(UserError, match="= 6 must be divisible by 4"):
        GTAConfig(24, 4, 16)
