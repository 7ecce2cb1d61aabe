"""MLA from MHA: the same function with room enough, and better than chance choices with less."""

from dataclasses import replace

import pytest
import torch

from mla_lm import AttentionConfig, Transformer, TransformerConfig, UserError
from mla_lm.interop.from_mha import convert

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
HEAD_DIM = 8


def model_of(kind: str, rope_dim: int | None = None, **changes) -> Transformer:
    torch.manual_seed(0)
    attention = AttentionConfig(kind=kind, num_kv_heads=HEADS[kind], rope_dim=rope_dim)
    model = Transformer(TransformerConfig(2, 32, 4, 24, 48, attention, vocab_size=61, **changes)).eval()
    for name, parameter in model.named_parameters():  # as they begin, attention would hardly matter
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def text(windows: int = 40) -> torch.Tensor:
    """Ids with some order in them: steps of a random walk."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-3, 4, (windows, 24), generator=generator).cumsum(1) % 61


def error(model: Transformer, converted: Transformer) -> float:
    with torch.no_grad():
        expected, logits = model(text(50)[40:]), converted(text(50)[40:])
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_full_rank_and_all_rotated_is_the_same_model(kind, use_bias):
    model = model_of(kind, use_bias=use_bias)
    keys = HEADS[kind] * HEAD_DIM
    converted = convert(model, text(), kv_compressed_dim=keys, rope_dim=keys)
    assert converted.config.attention.kind == "mla"
    with torch.no_grad():
        expected = model(text())
        assert expected.std() > 0.5
        torch.testing.assert_close(converted(text()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_decodes_through_the_latent_cache(kind):
    converted = convert(model_of(kind), text(), kv_compressed_dim=6, rope_dim=4)
    cache = converted.new_cache(2)
    tokens = text(2)
    with torch.no_grad():
        decoded = torch.cat([converted(token, cache=cache) for token in tokens.split(1, dim=1)], dim=1)
        torch.testing.assert_close(decoded, converted(tokens), rtol=1e-4, atol=1e-4)
    assert cache.nbytes == 2 * 2 * 24 * (6 + 4) * 4


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_more_room_is_nearer(kind):
    model = model_of(kind)
    keys = HEADS[kind] * HEAD_DIM
    latents = [error(model, convert(model, text(), r, keys)) for r in (2, keys // 2, keys)]
    assert latents[0] > latents[1] > latents[2]
    rotated = [error(model, convert(model, text(), min(32, 2 * keys), m)) for m in (2, keys // 2, keys)]
    assert rotated[0] > rotated[1] > rotated[2]
    assert rotated[2] < 1e-4


def test_heads_that_are_alike_need_one_rotated_key():
    """MHA with all key and value heads equal is MQA: the components find that out."""
    model = model_of("mha")
    for block in model.blocks:
        for proj in (block.attention.k_proj, block.attention.v_proj):
            proj.weight.data[:] = proj.weight.data[:HEAD_DIM].repeat(4, 1)
    assert error(model, convert(model, text(), HEAD_DIM, HEAD_DIM)) < 1e-3


def test_plain_rope_has_the_frequencies_of_its_size():
    model = model_of("gqa")
    chosen, plain = (convert(model, text(), 32, 4, plain_rope) for plain_rope in (False, True))
    assert plain.config.attention.rope_frequencies is None
    assert len(chosen.config.attention.rope_frequencies) == 2
    assert error(model, chosen) < error(model, plain) < 1
    mqa = model_of("mqa")  # whose one head is all there is: no choice, no loss
    assert error(mqa, convert(mqa, text(), HEAD_DIM, HEAD_DIM, plain_rope=True)) < 1e-4


def test_heads_of_which_a_part_is_rotated():
    """The pairs that RoPE leaves as they are need no room in the rotated key."""
    model = model_of("mqa", rope_dim=4)
    for plain_rope in (False, True):
        assert error(model, convert(model, text(), 2 * HEAD_DIM, 4, plain_rope)) < 1e-4
    with pytest.raises(UserError, match="must divide 4"):
        convert(model, text(), 8, 8, plain_rope=True)
    with pytest.raises(UserError, match="must divide 0"):
        convert(model_of("mqa", rope_dim=0), text(), 8, 8, plain_rope=True)


def test_refusals():
    model = model_of("gqa")
    with pytest.raises(UserError, match="rope_dim=3 must be even"):
        convert(model, text(), 8, 3)
    with pytest.raises(UserError, match=r"rope_dim=18 .* at most the 16 dimensions"):
        convert(model, text(), 8, 18)
    with pytest.raises(UserError, match="must divide 8"):
        convert(model, text(), 8, 6, plain_rope=True)
    with pytest.raises(UserError, match=r"kv_compressed_dim=33 .* at most 32"):
        convert(model, text(), 33, 8)
    with pytest.raises(UserError, match="of kind mla: give an MHA"):
        convert(convert(model, text(), 8, 8), text(), 8, 8)
    extended = replace(model.config.attention, yarn=replace(model.config.attention.yarn, factor=4.0))
    with pytest.raises(UserError, match=r"yarn\.factor=4"):
        convert(Transformer(replace(model.config, attention=extended)), text(), 8, 8)
