"""Tensor Product Attention: by the paper's equations, and from factors as from keys and values."""

import pytest
import torch

from mla_lm import UserError
from mla_lm.attention import rotate
from mla_lm.attention.tpa import TPA, TPAConfig


def small(**changes) -> TPA:
    torch.manual_seed(0)
    tpa = TPA(TPAConfig(**{"d_model": 32, "num_heads": 4, "seq_len": 16, "q_rank": 3, "kv_rank": 2, **changes})).eval()
    tpa.init_weights()
    return tpa


def test_equations_of_the_paper():
    """Section 3, term by term, head by head and token by token, in fp64."""
    tpa, h = small().double(), torch.randn(5, 32, dtype=torch.float64)
    cos, sin = (t.double() for t in tpa.rope(0, 5))
    rope = lambda x: rotate(x[None], cos, sin)[0]  # noqa: E731

    def slices(proj, rank):  # eq. 3.1: (5, 4, 8)
        total = 0
        for r in range(rank):
            a, b = (h @ proj.weight[r * 12 : (r + 1) * 12].T).split((4, 8), dim=1)
            total = total + torch.einsum("th,td->thd", a, b)
        return total / rank

    q, k, v = rope(slices(tpa.q_proj, 3)), rope(slices(tpa.k_proj, 2)), slices(tpa.v_proj, 2)  # eq. 3.4
    heads = []
    for i in range(4):
        weights = [torch.softmax(k[: t + 1, i] @ q[t, i] / 8**0.5, 0) for t in range(5)]  # eq. 3.2
        heads.append(torch.stack([w @ v[: t + 1, i] for t, w in enumerate(weights)]))
    expected = torch.cat(heads, 1) @ tpa.out_proj.weight.T  # eq. 3.3
    torch.testing.assert_close(tpa(h[None])[0], expected, rtol=1e-6, atol=1e-7)  # RoPE's table is fp32


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("kv_rank", [1, 2])
@torch.no_grad()
def test_from_factors_as_from_keys_and_values(factors, kv_rank):
    tpa, x = small(kv_rank=kv_rank), torch.randn(2, 9, 32)
    tpa.factors_are_cheaper = lambda queries: factors
    cache = tpa.new_cache(2, 9)
    out = torch.cat([tpa(part, cache) for part in x.split([4, 1, 3, 1], dim=1)], dim=1)
    torch.testing.assert_close(out, tpa(x), rtol=1e-5, atol=1e-5)


def test_decoding_takes_the_factors_and_a_long_prefill_does_not():
    tpa = small()
    assert tpa.factors_are_cheaper(1)
    assert not tpa.factors_are_cheaper(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rank": 0}, "q_rank=0 must be at least 1"),
        ({"kv_rank": -1}, "kv_rank=-1 must be at least 1"),
        ({"num_heads": 5}, "d_model=32 is not divisible by num_heads=5"),
        ({"d_model": 12}, "= 3 must be even for RoPE"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(UserError, match=message):
        small(**change)


def test_factors_begin_as_xavier_draws_them():
    tpa = small(d_model=256, num_heads=8)
    for proj in (tpa.q_proj, tpa.k_proj, tpa.v_proj):
        assert proj.weight.std().item() == pytest.approx((2 / sum(proj.weight.shape)) ** 0.5, rel=0.05)
