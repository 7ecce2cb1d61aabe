"""An exported run computes in transformers what it computes here."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, LlamaForCausalLM

from mla_lm import AttentionConfig, Transformer, UserError
from mla_lm.attention import KINDS
from mla_lm.data.tokenizer import encode
from mla_lm.inference.generate import generate
from mla_lm.interop.hf.folder import export_run, import_folder
from mla_lm.interop.hf.weights import from_transformers
from mla_lm.runs.load import load_run
from tests.interop.hf.models import END_OF_TEXT, MODELS, TOKENIZER, VOCABULARY, make_run, random_tokens, tensors
from tests.kinds import preset_of


@pytest.fixture(params=MODELS, scope="module")
def pair(request, tmp_path_factory) -> tuple[Transformer, torch.nn.Module]:
    """A model here and what transformers loads of its export."""
    attention, others = MODELS[request.param]
    folder = tmp_path_factory.mktemp("export")
    ours = make_run(folder / "run", attention, **others)
    export_run(folder / "run", folder / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs) is (DeepseekV3ForCausalLM if "mla" in request.param else LlamaForCausalLM)
    return ours, theirs.eval()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_logits(pair):
    ours, theirs = pair
    tokens = random_tokens(2, 96)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        close(ours(tokens), expected, 1e-5)


def test_logits_of_padded_prompts(pair):
    """Of different lengths, padded on the left as transformers wants them; ours each alone."""
    ours, theirs = pair
    prompts = [random_tokens(length) for length in (40, 7, 1)]
    batch = torch.full((3, 40), END_OF_TEXT)
    mask = torch.zeros(3, 40, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 40 - len(prompt) :] = prompt
        mask[row, 40 - len(prompt) :] = 1
    with torch.no_grad():
        logits = theirs(batch, attention_mask=mask).logits
        for row, prompt in enumerate(prompts):
            close(ours(prompt[None])[0], logits[row, 40 - len(prompt) :], 1e-5)


@torch.no_grad()
def greedy(model: Transformer, prompt: torch.Tensor, pieces: tuple[int, ...] | int) -> torch.Tensor:
    """The 64 likeliest ids after a prompt that is fed to the cache in pieces of these lengths."""
    cache, ids = model.new_cache(1), []
    for piece in prompt.split(pieces):
        logits = model(piece[None], cache=cache)
    for _ in range(64):
        ids.append(logits[0, -1].argmax().item())
        logits = model(torch.tensor([ids[-1:]]), cache=cache)
    return torch.tensor(ids)


def test_64_greedy_tokens(pair):
    """Theirs in a padded batch; ours in a batch, and alone after the prompt came in pieces."""
    ours, theirs = pair
    theirs.generation_config.eos_token_id = None  # always 64
    prompts = [random_tokens(length) for length in (31, 12, 3)]
    batch = torch.stack([F.pad(prompt, (31 - len(prompt), 0), value=END_OF_TEXT) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (31 - len(prompt), 0)) for prompt in prompts])
    expected = theirs.generate(batch, attention_mask=mask, max_new_tokens=64, do_sample=False)[:, 31:]
    rows = torch.stack(list(generate(ours, prompts, 64, temperature=0)), dim=1)
    for prompt, row, their_ids, pieces in zip(prompts, rows, expected, ((20, 1, 10), 5, 3), strict=True):
        assert len(their_ids.unique()) > 5
        assert torch.equal(row[row >= 0], their_ids)
        assert torch.equal(greedy(ours, prompt, pieces), their_ids)


def test_gradients(pair):
    ours, theirs = pair
    tokens = random_tokens(4, 33)
    theirs.zero_grad()
    logits = theirs(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    ours.zero_grad()
    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    interleaved = ours.config.attention.kind == "mla"
    expected = from_transformers({n: p.grad for n, p in theirs.named_parameters()}, ours.config, interleaved)
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name], 1e-4)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.transformers is None])
def test_a_kind_that_transformers_cannot_hold(tmp_path, kind):
    make_run(tmp_path / "run", preset_of(f"{kind}_tiny").attention)
    with pytest.raises(UserError, match=f"no model class of transformers can hold model.attention.kind={kind}"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mla_without_rope_cannot_be_written(tmp_path):
    attention = AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=0)
    make_run(tmp_path / "run", attention)
    with pytest.raises(UserError, match="rope_dim=0: transformers' DeepseekV3 cannot have"):
        export_run(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("latent_norm", [True, False])
@torch.no_grad()
def test_the_scale_of_latents_goes_into_their_norms(tmp_path, latent_norm):
    attention = AttentionConfig(
        kind="mla", kv_compressed_dim=24, q_compressed_dim=20, rope_dim=8, latent_norm=latent_norm, latent_scale=True
    )
    ours, tokens = make_run(tmp_path / "run", attention), random_tokens(2, 96)
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(ours(tokens), theirs(tokens).logits, 1e-4)


def test_weights_in_bf16(tmp_path):
    model = make_run(tmp_path / "run", *MODELS["mla"][:1])
    export_run(tmp_path / "run", tmp_path / "out", torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, model.head.weight.bfloat16())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_run(folder / "run", AttentionConfig())
    export_run(folder / "run", folder / "out")
    return AutoTokenizer.from_pretrained(folder / "out")


@given(text=st.text() | st.sampled_from(("<|endoftext|>", "a <|endoftext|>b", " a , b ! it 's")))
def test_the_tokenizer_encodes_and_decodes_as_ours(tokenizer, text):
    """With the token before it that begins a document; its name in a text is text."""
    ids = tokenizer(text)["input_ids"]
    assert ids == [END_OF_TEXT, *encode(TOKENIZER, text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_pads_and_ends(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == END_OF_TEXT
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]  # generate() takes no other of them
    batch = tokenizer(["ab", "c"], padding=True)
    assert batch["input_ids"] == [[256, 97, 98], [256, 256, 99]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 1, 1]]


def test_what_is_written(tmp_path):
    make_run(tmp_path / "run", *MODELS["mla-low-rank-query"][:1])
    (tmp_path / "out").mkdir()
    export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "run"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_interleave"] is True
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["first_k_dense_replace"] == config["num_hidden_layers"] == 2
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    weights = tensors(tmp_path / "out")
    assert config["tie_word_embeddings"] is True
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])  # vLLM and SGLang do not tie
    card = (tmp_path / "out" / "README.md").read_text()
    assert "DeepseekV3ForCausalLM" in card
    assert "| perplexity, test | not measured |" in card
    assert "32 elements a token and layer" in card
    assert str(tmp_path) not in card


def test_yarn_of_deepseek_names_both_mscales(tmp_path):
    """transformers takes either for absent where only one is given."""
    make_run(tmp_path / "run", *MODELS["mla-yarn"][:1])
    export_run(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = config["rope_scaling"]
    assert config["rope_parameters"] == {**scaling, "rope_theta": 10000.0}
    assert (scaling["factor"], scaling["mscale"], scaling["mscale_all_dim"]) == (4.0, 1.0, 0.5)


def test_a_converted_model_has_norms_that_do_nothing(tmp_path):
    """MLA from MHA has no norm of the latent, DeepseekV3 has one: usual latents come through it unchanged."""
    ours = make_run(tmp_path / "run", AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=8, latent_norm=False))
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = random_tokens(2, 96)
    with torch.no_grad():
        expected = ours(tokens)
        assert expected.std() > 0.5
        close(theirs(tokens).logits, expected, 1e-4)
    import_folder(tmp_path / "out", tmp_path / "back")
    with torch.no_grad():
        close(load_run(tmp_path / "back")[0](tokens), expected, 1e-4)


@pytest.mark.parametrize("name", ["mla", "gqa", "mla-yarn"])
def test_long_positions(tmp_path, name):
    """At 4,000 positions their angles, products in fp32, are off by 1e-4; with the same angles logits are the same."""
    attention, others = MODELS[name]
    ours = make_run(tmp_path / "run", attention, **{**others, "seq_len": 4096, "num_layers": 1})
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = random_tokens(1, 4096)
    with torch.no_grad():
        expected = theirs(tokens).logits
        close(ours(tokens)[:, :512], expected[:, :512], 1e-5)
        close(ours(tokens), expected, 2e-4)
        rope, rotary = ours.blocks[0].attention.rope, theirs.model.rotary_emb
        angle = torch.outer(torch.arange(4096.0), rotary.inv_freq)
        rope.cos, rope.sin = rotary.attention_scaling * angle.cos(), rotary.attention_scaling * angle.sin()
        close(ours(tokens), expected, 1e-5)
