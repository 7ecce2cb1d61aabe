"""The whole model: what it holds, how it begins, and that every way of running it computes the same."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mla_lm import AttentionConfig, Transformer, UserError
from mla_lm.hardware import DTYPES, inference_autocast
from mla_lm.model.layers import Block
from tests.kinds import config_of, each_kind, model_of


def tokens_and_targets(batch: int = 2, length: int = 16):
    tokens = torch.randint(61, (batch, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


@each_kind
def test_logits_and_loss(kind):
    model = model_of(kind)
    tokens, targets = tokens_and_targets()
    logits, losses = model(tokens), model(tokens, targets, reduction="none")
    assert logits.shape == (2, 16, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 16)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(model(tokens, targets), expected.mean())
    assert abs(expected.mean().item() - torch.tensor(61.0).log().item()) < 0.3  # a new model knows nothing


@each_kind
@pytest.mark.parametrize("fp8", [False, True])
def test_activation_checkpointing_changes_nothing(kind, fp8):
    plain, saving = model_of(kind, dropout=0.2), model_of(kind, dropout=0.2, activation_checkpointing=True)
    tokens, targets = tokens_and_targets()
    losses = []
    for model in (plain, saving):
        if fp8:
            model.train_in_fp8()
        torch.manual_seed(1)  # the dropout of the recomputation is that of the first pass
        with torch.autocast("cpu", torch.bfloat16, enabled=fp8):
            losses.append(model(tokens, targets))
        losses[-1].backward()
    assert torch.equal(*losses)
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_activation_checkpointing_recomputes():
    model, calls = model_of("mla", activation_checkpointing=True), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model(*tokens_and_targets())
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


def test_a_cache_is_used_in_training_mode_too():
    model = model_of("mla", activation_checkpointing=True).train()
    tokens, _ = tokens_and_targets()
    cache = model.new_cache(2)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(8, dim=1)], dim=1)
    assert cache.length == 16
    torch.testing.assert_close(logits, model(tokens), rtol=1e-5, atol=1e-5)


@each_kind
def test_dropout_only_in_training(kind):
    model = model_of(kind, dropout=0.3)
    tokens, _ = tokens_and_targets()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_head(tied):
    model = model_of("mla", tie_embeddings=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    names = dict(model.named_parameters())
    assert ("head.weight" in names) == (not tied)
    model(*tokens_and_targets()).backward()
    unseen = model.embedding.weight.grad.abs().sum(1) == 0
    assert unseen.any() == (not tied)  # tied, each row gets the head's gradient


class Products(TorchDispatchMode):
    """Counts products in fp8."""

    in_fp8 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.in_fp8 += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


def gradient(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The gradients of all parameters, in one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens.roll(-1))
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@each_kind
def test_fp8_is_for_training_and_for_blocks_alone(kind):
    model = model_of(kind)
    tokens, _ = tokens_and_targets()
    expected, logits, names = gradient(model, tokens), model.eval()(tokens), list(model.state_dict())
    left_out = model.train_in_fp8()
    assert torch.equal(model(tokens), logits)
    assert list(model.state_dict()) == names
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with Products() as ran:
        found = gradient(model.train(), tokens)
    linears = [name.split(".", 1)[1] for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]
    assert ran.in_fp8 == 3 * sum(name not in left_out for name in linears)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()


def test_what_does_not_fit_fp8_is_left_out():
    sizes = {"d_model": 64, "num_heads": 4, "ff_hidden": 100}
    attention = AttentionConfig(kind="mla", kv_compressed_dim=16, rope_dim=4, nope_dim=12, value_dim=16)
    model = model_of("mla", **sizes, attention=attention, tie_embeddings=False)
    feed_forward = [f"feed_forward.{name}_proj" for name in ("gate", "up", "down")]
    assert model.train_in_fp8() == ["attention.kv_down", *feed_forward]  # 64 to 20, and 64 to 100 and back
    assert not model.head.fp8


@each_kind
def test_initialisation_scales_what_writes_to_the_residual_stream(kind):
    model = model_of(kind, num_layers=8, d_model=128, ff_hidden=256)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        if kind == "tpa" and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            continue  # see test_tpa.py
        writes = name.endswith(("out_proj.weight", "down_proj.weight"))
        expected = 0.02 / (2 * 8) ** 0.5 if writes else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


@each_kind
def test_biases_only_where_asked_for(kind):
    assert not [name for name, _ in model_of(kind).named_parameters() if "bias" in name]
    biases = {name: p for name, p in model_of(kind, use_bias=True).named_parameters() if "bias" in name}
    assert {"blocks.0.attention.out_proj.bias", "blocks.1.feed_forward.down_proj.bias"} <= biases.keys()
    assert not any(p.any() for p in biases.values())


def test_state_dict_is_parameters_alone():
    model = model_of("mla", tie_embeddings=False)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@each_kind
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_prepared_for_decoding_it_computes_the_same(kind, precision):
    """Under autocast to the bit: its weights are rounded once and not at every step."""
    model, (tokens, _) = model_of(kind, use_bias=True).eval(), tokens_and_targets()
    prepared = copy.deepcopy(model).prepare_decoding(DTYPES[precision])
    with torch.no_grad(), inference_autocast("cpu", precision):
        outs = []
        for net in (model, prepared):
            cache = net.new_cache(2, dtype=DTYPES[precision])
            outs.append(torch.cat([net(part, cache=cache) for part in tokens.split([12, 1, 1, 1, 1], dim=1)], dim=1))
    rounding = {"rtol": 1e-5, "atol": 1e-6} if precision == "32-true" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(outs[1], outs[0], **rounding)
    assert torch.equal(prepared.embedding.weight, model.embedding.weight)


def test_meta_device_then_loaded_equals_built():
    model, (tokens, _) = model_of("mla"), tokens_and_targets()
    with torch.device("meta"):
        empty = Transformer(config_of("mla"))
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


def test_bf16_weights_keep_exact_positions():
    model, (tokens, targets) = model_of("mla").to(torch.bfloat16), tokens_and_targets()
    assert model.blocks[0].attention.rope.cos.dtype == torch.float32
    assert model(tokens).dtype == torch.bfloat16
    assert model(tokens, targets).dtype == torch.float32


@each_kind
def test_block_compiles_to_one_graph_once(kind):
    torch._dynamo.reset()
    block, x = Block(config_of(kind, dropout=0.1)), torch.randn(2, 16, 128)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    block.eval()
    with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            out, _ = compiled(x)
        torch.testing.assert_close(out, block(x)[0], rtol=1e-2, atol=1e-2)
        out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("fp8", [False, True])
def test_compiled_model_breaks_at_the_loss_alone(fp8):
    torch._dynamo.reset()
    model, (tokens, targets) = model_of("mla"), tokens_and_targets()
    if fp8:
        model.train_in_fp8()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=fp8)
    with autocast:
        expected = model(tokens, targets)
    outputs = []  # of each compiled graph's each run

    def backend(graph, _):
        return lambda *args: outputs.append(graph(*args)) or outputs[-1]

    compiled = torch.compile(model, backend=backend)
    with autocast, torch._dynamo.config.patch(error_on_recompile=True):
        losses = [compiled(tokens, targets) for _ in range(3)]
    assert [out[0].shape for out in outputs] == [(2, 16, 128)] * 3  # from the embedding to the last norm
    torch.testing.assert_close(losses[-1], expected)
    losses[-1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_too_many_tokens():
    with pytest.raises(ValueError, match="17 tokens is longer than seq_len=16"):
        model_of("mha")(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (AttentionConfig(nope_dim=4), "nope_dim is set, but belongs to kind mla"),
        (AttentionConfig(kind="gqa", num_kv_heads=2, q_compressed_dim=4), "q_compressed_dim is set, but belongs to"),
        (AttentionConfig(kind="mla", kv_compressed_dim=8, rope_dim=4, num_kv_heads=2), "belongs to kind mha or gqa or"),
        (AttentionConfig(kind="mla", kv_compressed_dim=8), "rope_dim is missing"),
        (AttentionConfig(kind="mla", rope_dim=4), "kv_compressed_dim is missing"),
        (AttentionConfig(kind="mla", kv_compressed_dim=8, rope_dim=3), "rope_dim=3 must be even"),
        (AttentionConfig(kind="mla", kv_compressed_dim=0, rope_dim=4), "kv_compressed_dim=0 must be at least 1"),
        (AttentionConfig(kind="gqa", num_kv_heads=3), "not divisible by num_kv_heads=3"),
        (AttentionConfig(kind="gqa", num_kv_heads=4), "num_kv_heads=4 of 4 heads is not gqa"),
        (AttentionConfig(kind="gqa"), "num_kv_heads=None of 4 heads is not gqa"),
        (AttentionConfig(kind="mqa", num_kv_heads=2), "num_kv_heads=2 of 4 heads is not mqa: it must be 1"),
        (AttentionConfig(num_kv_heads=2), "num_kv_heads=2 of 4 heads is not mha: it must be num_heads"),
        (AttentionConfig(num_kv_heads=0), "num_kv_heads=0 must be at least 1"),
    ],
)
def test_attention_that_cannot_be(attention, message):
    with pytest.raises(UserError, match=message):
        Transformer(replace(config_of("mha"), attention=attention))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"ff_hidden": -1}, "ff_hidden=-1 must be at least 1"),
        ({"d_model": 30}, "d_model=30 is not divisible by num_heads=4"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be at least 0 and below 1"),
        ({"vocab_size": None}, "vocab_size is not set"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        Transformer(config_of("mla", **changes))


def test_feed_forward_is_swiglu():
    feed_forward = model_of("mha").blocks[0].feed_forward
    x = torch.randn(3, 128)
    gate, up, down = (m.weight for m in feed_forward.children() if isinstance(m, nn.Linear))
    z = x @ gate.T
    torch.testing.assert_close(feed_forward(x), (z * torch.sigmoid(z) * (x @ up.T)) @ down.T)
