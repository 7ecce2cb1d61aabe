"""MLA as the documented API of the published package, and the facts that make it attention of a language model."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mla_lm.attention import MLA, MLAConfig, rotate


def small(**changes) -> MLA:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "kv_compressed_dim": 12, "q_compressed_dim": 10, "rope_dim": 4}
    return MLA(MLAConfig(**{**sizes, "seq_len": 16, **changes})).eval()


def test_documented_example():
    config = MLAConfig(d_model=256, num_heads=8, kv_compressed_dim=64, q_compressed_dim=128, rope_dim=32, seq_len=256)
    assert MLA(config)(torch.randn(2, 256, 256)).shape == (2, 256, 256)


def test_positional_order():
    config = MLAConfig(256, 8, 64, 128, 32, 512, 0.1, True)
    named = MLAConfig(
        d_model=256,
        num_heads=8,
        kv_compressed_dim=64,
        q_compressed_dim=128,
        rope_dim=32,
        seq_len=512,
        dropout=0.1,
        use_bias=True,
    )
    assert config == named
    assert (config.nope_dim, config.value_dim) == (32, 32)


@dataclass
class UserConfig:
    """What a user of the package writes around it."""

    d_model: int
    num_heads: int
    kv_compressed_dim: int
    q_compressed_dim: int
    rope_dim: int
    seq_len: int
    vocab_size: int
    ff_hidden: int
    hidden_dim: int = 128
    action_embed: int = 64
    dropout: float = 0.0
    use_bias: bool = False


class TransformerBlock(nn.Module):
    def __init__(self, config: UserConfig):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(config.d_model), nn.RMSNorm(config.d_model)
        names = ("d_model", "num_heads", "kv_compressed_dim", "q_compressed_dim", "rope_dim", "seq_len")
        self.attention = MLA(MLAConfig(**{name: getattr(config, name) for name in names}))
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.ff_hidden), nn.GELU(), nn.Linear(config.ff_hidden, config.d_model)
        )
        self.res_dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.res_dropout(self.attention(self.norm_1(x)))
        return x + self.res_dropout(self.feed_forward(self.norm_2(x)))


def test_documented_block_trains():
    config = UserConfig(
        d_model=64,
        num_heads=4,
        kv_compressed_dim=16,
        q_compressed_dim=32,
        rope_dim=8,
        seq_len=24,
        vocab_size=100,
        ff_hidden=128,
        dropout=0.1,
    )
    block = TransformerBlock(config)
    x = torch.randn(3, 24, 64)
    out = block(x)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_last_token_changes_no_earlier_output():
    mla, x = small(), torch.randn(2, 16, 32)
    changed = x.clone()
    changed[:, -1] += 1
    before, after = mla(x), mla(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_order_of_the_tokens_matters():
    # The last token sees all the others: only RoPE tells it their order.
    mla, x = small(), torch.randn(1, 8, 32)
    permuted = x[:, [2, 0, 1, 5, 3, 6, 4, 7]]
    assert (mla(x)[:, -1] - mla(permuted)[:, -1]).abs().max() > 1e-4


def test_dropout_only_in_training():
    mla, x = small(dropout=0.5), torch.randn(2, 8, 32)
    assert torch.equal(mla(x), mla(x))
    mla.train()
    first, second = mla(x), mla(x)
    assert not torch.equal(first, second)
    assert 0.3 < (first == 0).float().mean() < 0.7


def test_too_long_a_sequence_is_refused():
    mla = small()
    mla(torch.randn(1, 16, 32))
    with pytest.raises(ValueError, match="17 tokens is longer than seq_len=16"):
        mla(torch.randn(1, 17, 32))


@pytest.mark.parametrize("q_compressed_dim", [None, 10])
def test_equations_of_the_paper(q_compressed_dim):
    """Section 2.1, head by head and token by token, in fp64."""
    mla = small(q_compressed_dim=q_compressed_dim, nope_dim=6, value_dim=5, use_bias=False).double()
    h = torch.randn(5, 32, dtype=torch.float64)
    cos, sin = (t.double() for t in mla.rope(0, 5))
    rms = lambda x, norm: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight  # noqa: E731
    rope = lambda x: rotate(x[None, :, None], cos, sin)[0, :, 0]  # noqa: E731

    down = h @ mla.kv_down.weight.T
    c_kv, k_rope = rms(down[:, :12], mla.kv_norm), rope(down[:, 12:])  # eqs. 9, 15
    if q_compressed_dim is None:
        q_all = h @ mla.q_proj.weight.T
    else:
        q_all = rms(h @ mla.q_down.weight.T, mla.q_norm) @ mla.q_up.weight.T  # eqs. 12, 13
    heads = []
    for i in range(4):
        q = q_all[:, i * 10 : (i + 1) * 10]
        w_uk, w_uv = mla.kv_up.weight[i * 11 : (i + 1) * 11].split((6, 5))
        q, k = torch.cat((q[:, :6], rope(q[:, 6:])), 1), torch.cat((c_kv @ w_uk.T, k_rope), 1)  # eqs. 10, 14, 16, 17
        weights = [torch.softmax(k[: t + 1] @ q[t] / (6 + 4) ** 0.5, 0) for t in range(5)]
        heads.append(torch.stack([w @ (c_kv @ w_uv.T)[: t + 1] for t, w in enumerate(weights)]))  # eqs. 11, 18
    expected = torch.cat(heads, 1) @ mla.out_proj.weight.T  # eq. 19
    torch.testing.assert_close(mla(h[None])[0], expected, rtol=1e-6, atol=1e-7)  # RoPE's table is fp32


def test_bias_reaches_every_projection_of_the_input():
    with_bias = {name for name, _ in small(use_bias=True).named_parameters() if name.endswith("bias")}
    assert with_bias == {"q_down.bias", "q_up.bias", "kv_down.bias", "out_proj.bias"}
    assert not [name for name, _ in small().named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("absorb", [False, True])
@torch.no_grad()
def test_without_rope(dtype, absorb):
    """Keys have no position: earlier tokens may come in any order. The cache holds latents alone."""
    mla, x = small(rope_dim=0), torch.randn(2, 9, 32)
    torch.testing.assert_close(mla(x)[:, -1], mla(x[:, [3, 1, 0, 2, 7, 6, 5, 4, 8]])[:, -1])
    mla.absorbing_is_cheaper = lambda queries, keys: absorb
    cache = mla.new_cache(2, 9, dtype)
    out = torch.cat([mla(part, cache) for part in x.split([4, 1, 3, 1], dim=1)], dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out, mla(x), rtol=tolerance, atol=tolerance)
    assert cache.nbytes == 2 * 9 * (12 * 4 if dtype == torch.float32 else 12 + 2)


@torch.no_grad()
def test_without_rope_a_compiled_step_takes_the_cpu_kernel():
    mla, x = small(rope_dim=0, kv_compressed_dim=16), torch.randn(1, 9, 32)
    torch._dynamo.reset()
    graphs, cache = [], mla.new_cache(1, 9)
    compiled = torch.compile(mla, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    mla(x[:, :8], cache)
    torch.testing.assert_close(compiled(x[:, 8:], cache), mla(x)[:, 8:], rtol=1e-5, atol=1e-5)
    assert "attend_to_all" in graphs[0].code


@torch.no_grad()
def test_the_scale_of_latents_is_that_of_their_norms():
    plain, scaled = small(), small(latent_scale=True)
    for norm, width in ((plain.q_norm, 10), (plain.kv_norm, 12)):
        norm.weight.mul_((32 / width) ** 0.5)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(plain(x), scaled(x))


def test_init_by_fan_in():
    config = MLAConfig(256, 8, 64, 128, 16, 32, init="fan_in")
    mla = MLA(config)
    before = mla.q_down.weight.clone()
    mla.init_weights()
    assert mla.kv_up.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert mla.q_up.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert torch.equal(mla.q_down.weight, before)
