"""Converts a trained MHA, GQA or MQA model to MLA, after TransMLA (arXiv 2502.07864) and MHA2MLA (arXiv 2502.14837).

At one frequency, the rotated pairs of all key heads form a complex vector that RoPE rotates as a whole. Any unitary mix
of its entries commutes with the rotation, so principal components of the keys can take the place of heads. The few
components that matter most stay rotated, in the one key that all of MLA's heads share. The others lose their rotation,
which is slight at low frequencies, and are compressed with the values into the latent. Its directions are those of
largest variance on real text. With enough room nothing is lost: all pairs rotated, and a latent as wide as the values.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from mla_lm.attention import MHA, AttentionConfig, MHAConfig
from mla_lm.errors import UserError
from mla_lm.model.config import TransformerConfig
from mla_lm.model.layers import Block
from mla_lm.model.transformer import Transformer

RIDGE = 1e-6  # share of the mean variance that is added to every direction, so that none has weight zero


@torch.no_grad()
def convert(
    model: Transformer, windows: Tensor, kv_compressed_dim: int, rope_dim: int, plain_rope: bool = False
) -> Transformer:
    """Convert a model to MLA, as close to the original as kv_compressed_dim and rope_dim allow.

    Args:
        model: of kind mha, gqa or mqa, in evaluation mode
        windows: (N, T) ids of text like the training data; a few tens of thousands of tokens in all
        plain_rope: keep rotated the pairs that have the frequencies of plain RoPE over rope_dim, so that the model can
            be exported, instead of the pairs that matter most

    Raises:
        UserError: `model` is MLA already, or the sizes are larger than its keys and values can fill.
    """
    config = converted_config(model.config, kv_compressed_dim, rope_dim, plain_rope)
    layers = [
        _Layer.of(cast(MHA, block.attention), moments)
        for block, moments in zip(model.blocks, _moments(model, windows), strict=True)
    ]
    rope = cast(MHA, cast(Block, model.blocks[0]).attention).rope
    frequencies = rope.frequency()
    if plain_rope:
        pairs = [(i, 0) for i in range(0, rope.rotated // 2, rope.rotated // rope_dim)]
    else:
        pairs = _choose_pairs(layers, frequencies, config.seq_len, rope_dim)
        config.attention.rope_frequencies = [frequencies[pair].item() for pair, _ in pairs]
    state = {name: tensor for name, tensor in model.state_dict().items() if ".attention." not in name}
    for i, layer in enumerate(layers):
        state |= {
            f"blocks.{i}.attention.{name}": t.float() for name, t in layer.as_mla(pairs, kv_compressed_dim).items()
        }
    converted = Transformer(config).eval()
    converted.load_state_dict(state)
    return converted


def converted_config(
    config: TransformerConfig, kv_compressed_dim: int, rope_dim: int, plain_rope: bool = False
) -> TransformerConfig:
    """The configuration of the model that `convert` makes, without the frequencies it chooses; errors as there."""
    layer = config.layer_config()
    if not isinstance(layer, MHAConfig):
        raise UserError(f"the model is of kind {config.attention.kind}: give an MHA, GQA or MQA run")
    if layer.yarn.factor != 1:
        raise UserError(f"yarn.factor={layer.yarn.factor}: convert the run from before its context was extended")
    head_dim = layer.head_dim
    keys = layer.num_kv_heads * head_dim
    if rope_dim % 2 or not 2 <= rope_dim <= keys:
        raise UserError(f"rope_dim={rope_dim} must be even, and at most the {keys} dimensions of all keys")
    if plain_rope and (layer.rope_dim == 0 or layer.rope_dim % rope_dim):
        raise UserError(
            f"rope_dim={rope_dim}: plain RoPE keeps every n-th of a head's pairs, so it must divide {layer.rope_dim}"
        )
    widest = min(2 * keys, config.d_model + config.use_bias)
    if not 1 <= kv_compressed_dim <= widest:
        raise UserError(
            f"kv_compressed_dim={kv_compressed_dim} must be at least 1, and at most {widest}: more holds nothing"
        )
    attention = AttentionConfig(
        kind="mla",
        kv_compressed_dim=kv_compressed_dim,
        rope_dim=rope_dim,
        nope_dim=head_dim,
        value_dim=head_dim,
        rope_base=layer.rope_base,
        latent_norm=False,
    )
    return replace(config, attention=attention)


def _moments(model: Transformer, windows: Tensor) -> list[Tensor]:
    """Second moments of each layer's attention input, with a 1 appended for biases: (d_model + 1, d_model + 1)."""
    size = model.config.d_model + 1
    sums = [torch.zeros(size, size, dtype=torch.float64) for _ in model.blocks]

    def adding_to(total: Tensor):
        def hook(_module, _inputs, x: Tensor) -> None:
            rows = torch.nn.functional.pad(x.double().flatten(0, 1), (0, 1), value=1.0)
            total.add_(rows.T @ rows)

        return hook

    hooks = [
        cast(Block, block).attention_norm.register_forward_hook(adding_to(total))
        for block, total in zip(model.blocks, sums, strict=True)
    ]
    for part in windows.split(8):
        model.hidden_states(part)
    for hook in hooks:
        hook.remove()
    return [total / windows.numel() for total in sums]


def _choose_pairs(layers: list["_Layer"], frequencies: Tensor, T: int, rope_dim: int) -> list[tuple[int, int]]:
    """Choose which (frequency, component) pairs stay rotated: those without whose rotation scores would change most.

    Without rotation, the contribution q conj(k) e^(i d w) to a score at distance d becomes q conj(k). The squared error
    is |1 - e^(i d w)|^2 times its energy. Each distance is weighted by how often it occurs in a window of T tokens.

    Args:
        frequencies: of the pairs of a head, (D/2,) radians per position
    """
    distance = torch.arange(T, dtype=torch.float64)
    turns = 2 - 2 * torch.cos(torch.outer(frequencies, distance))  # (D/2, T)
    turn = turns @ (T - distance) / (T - distance).sum()
    loss = sum(layer.energies for layer in layers) * turn.unsqueeze(1)  # (D/2, G)
    order = loss.flatten().argsort(descending=True)[: rope_dim // 2]
    return sorted(divmod(int(i), loss.size(1)) for i in order)


@dataclass
class _Layer:
    """One layer's projections in fp64, with the bias as last column, and the principal components of its keys.

    There are G key heads of D dimensions. Complex tensors hold the pair (i, i + D/2) as one number.
    """

    q: Tensor  # (H, D, d_model + 1)
    k: Tensor  # (G, D, d_model + 1)
    v: Tensor  # (G, D, d_model + 1)
    out: Tensor  # (d_model, H, D)
    out_bias: Tensor | None
    moments: Tensor  # (d_model + 1, d_model + 1)
    energies: Tensor  # (D/2, G): each component's variance in the scores, in descending order
    components: Tensor  # (D/2, G, d_model + 1) complex: maps the input to components
    mix: Tensor  # (D/2, G, G) complex: maps components to key heads

    @classmethod
    def of(cls, mha: MHA, moments: Tensor) -> "_Layer":
        heads, kv_heads = mha.config.num_heads, mha.config.num_kv_heads
        q, k, v = (
            _affine(proj).unflatten(0, (n, -1))
            for proj, n in ((mha.q_proj, heads), (mha.k_proj, kv_heads), (mha.v_proj, kv_heads))
        )
        queries, keys = _paired(q), _paired(k).transpose(0, 1)  # (H, D/2, d_model + 1), (D/2, G, d_model + 1)
        of_input = moments.to(torch.complex128)
        energy = torch.einsum(
            "hpi,ij,hpj->hp", queries, moments.to(torch.complex128), queries.conj()
        ).real  # of the queries
        weight = energy.unflatten(0, (kv_heads, -1)).sum(1).T  # (D/2, G)
        weight = (weight + RIDGE * weight.mean()).sqrt()
        scaled = weight.unsqueeze(-1) * keys
        variances, vectors = torch.linalg.eigh(scaled @ of_input @ scaled.mH)
        variances, vectors = variances.flip(-1), vectors.flip(-1)
        return cls(
            q, k, v,
            out=mha.out_proj.weight.double().unflatten(1, (heads, -1)),
            out_bias=mha.out_proj.bias,
            moments=moments,
            energies=variances,
            components=vectors.mH @ scaled,
            mix=vectors / weight.unsqueeze(-1),
        )  # fmt: skip

    def as_mla(self, pairs: list[tuple[int, int]], kv_compressed_dim: int) -> dict[str, Tensor]:
        """The state of an `MLA` with these (frequency, component) pairs in its shared key, the rest in its latent."""
        (heads, D, _), kv_heads = self.q.shape, len(self.k)
        frequency, component = (torch.tensor(column) for column in zip(*pairs, strict=True))
        rotated = self.components[frequency, component]  # (P, d_model + 1)
        share = self.mix[frequency, :, component]  # (P, G): of each rotated component in each key head
        share_of_head = share.T.repeat_interleave(heads // kv_heads, 0)  # (H, P)
        q_rope = _paired(self.q)[:, frequency] * share_of_head.conj().unsqueeze(-1)
        left = _paired(self.k).transpose(0, 1).clone()  # (D/2, G, d_model + 1)
        left.index_add_(0, frequency, -share.unsqueeze(-1) * rotated.unsqueeze(1))
        down, up = self._factor(_unpaired(left.transpose(0, 1)), kv_compressed_dim)

        # MLA scales scores by the full width of its query heads, MHA by D.
        scale = math.sqrt((D + 2 * len(pairs)) / D)
        k_up, v_up = up.unflatten(0, (2, kv_heads, D)).repeat_interleave(heads // kv_heads, 1)  # (H, D, r) each
        state = _split("q_proj", scale * torch.cat((self.q, _unpaired(q_rope)), 1).flatten(0, 1), self.out_bias)
        state |= _split("kv_down", torch.cat((down, _unpaired(rotated))), self.out_bias)
        state |= {"kv_up.weight": torch.cat((k_up, v_up), 1).flatten(0, 1), "out_proj.weight": self.out.flatten(1)}
        return state | ({} if self.out_bias is None else {"out_proj.bias": self.out_bias})

    def _factor(self, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factor keys (G, D, d_model + 1) and values jointly as up @ down of the given rank, optimal on the data.

        Errors in keys are measured by the change in scores, relative to all that the keys contribute; errors in values
        by the change in the output, likewise.

        Returns:
            down (rank, d_model + 1) and up (2 G D, rank)
        """
        kv_heads = len(keys)
        of_queries = (self.q @ self.moments @ self.q.mT).unflatten(0, (kv_heads, -1)).sum(1)  # (G, D, D)
        of_output = torch.einsum("mhd,mhe->hde", self.out, self.out).unflatten(0, (kv_heads, -1)).sum(1)
        weights, back = [], []
        for metric, whole in ((of_queries, self.k), (of_output, self.v)):
            values, vectors = torch.linalg.eigh(metric)
            root = (values.clamp(min=0) + RIDGE * values.mean()).sqrt()
            total = torch.einsum("gde,gei,ij,gdj->", metric, whole, self.moments, whole).sqrt()
            weights += [*(vectors * (root / total).unsqueeze(1) @ vectors.mT)]
            back += [*(vectors * (total / root).unsqueeze(1) @ vectors.mT)]
        joint = torch.cat((keys, self.v)).flatten(0, 1)  # (2 G D, d_model + 1)
        weighted = torch.block_diag(*weights) @ joint
        variances, vectors = torch.linalg.eigh(weighted @ self.moments @ weighted.T)
        variances, vectors = variances[-rank:], vectors[:, -rank:]
        size = variances.clamp(min=1e-12 * variances[-1]).sqrt()  # gives every direction of the latent variance 1
        return (vectors / size).T @ weighted, torch.block_diag(*back) @ (vectors * size)


def _affine(proj: torch.nn.Linear) -> Tensor:
    """The weight of a linear layer with its bias as last column, (out, in + 1) in fp64."""
    bias = proj.weight.new_zeros(len(proj.weight)) if proj.bias is None else proj.bias
    return torch.cat((proj.weight, bias.unsqueeze(1)), 1).double()


def _split(name: str, affine: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Split `affine` into the state of a linear layer; its last column is used only if the model has biases."""
    return {f"{name}.weight": affine[:, :-1]} | ({} if bias is None else {f"{name}.bias": affine[:, -1]})


def _paired(heads: Tensor) -> Tensor:
    """Join halves into complex pairs: (..., D, n) to (..., D/2, n)."""
    return torch.complex(*heads.chunk(2, dim=-2))


def _unpaired(pairs: Tensor) -> Tensor:
    """Split complex pairs into halves: (..., D/2, n) to (..., D, n)."""
    return torch.cat((pairs.real, pairs.imag), dim=-2)
