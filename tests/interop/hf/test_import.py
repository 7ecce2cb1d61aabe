"""A model of transformers, imported, computes here what it computes there, and comes back as it was."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mla_lm.attention.rope import YarnConfig
from mla_lm.inference.generate import generate
from mla_lm.interop.hf.folder import export_run, import_folder
from mla_lm.runs.load import load_run
from tests.interop.hf.models import END_OF_TEXT, MODELS, VOCABULARY, make_folder, make_run, random_tokens, tensors

SHARED = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 48,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "eos_token_id": END_OF_TEXT,
    "bos_token_id": END_OF_TEXT,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@st.composite
def shapes(draw) -> dict:
    """Sizes that both kinds share."""
    heads = draw(st.sampled_from((1, 2, 4)))
    return {
        **SHARED,
        "num_attention_heads": heads,
        "hidden_size": heads * draw(st.sampled_from((8, 12, 16))),
        "intermediate_size": draw(st.integers(8, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from((500.0, 10000.0)))},
    }


@st.composite
def deepseeks(draw) -> dict:
    """Even sizes, as DeepseekV2 takes pairs for complex numbers where they lie."""
    shape = draw(shapes())
    return {
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "kv_lora_rank": 2 * draw(st.integers(2, 12)),
        "q_lora_rank": draw(st.none() | st.integers(4, 24)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 6)),
        "qk_nope_head_dim": 2 * draw(st.integers(1, 6)),
        "v_head_dim": draw(st.integers(1, 20)),
        "first_k_dense_replace": 2,
    }


def assert_same_here(theirs: torch.nn.Module, folder, run):
    """Import, compare logits and greedy tokens."""
    import_folder(folder, run)
    ours, _, _ = load_run(run)
    tokens = random_tokens(2, 48)
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    continued = theirs.generate(tokens[:, :9], max_new_tokens=12, do_sample=False)[:, 9:]
    assert torch.equal(torch.stack(list(generate(ours, tokens[:, :9], 12, temperature=0)), dim=1), continued)


def assert_comes_back(folder, run, out) -> None:
    """Exported, the import has every tensor, and every entry of config.json that says what is computed."""
    export_run(run, out)
    before, after = tensors(folder), tensors(out)
    if "lm_head.weight" not in before:  # tied
        assert torch.equal(
            after.pop("lm_head.weight", before["model.embed_tokens.weight"]), before["model.embed_tokens.weight"]
        )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    unlike = {"architectures", "model_type"} if old["model_type"] == "deepseek_v2" else set()
    for name in new.keys() & old.keys() - unlike - {"head_dim", "pad_token_id"} - EXPERTS:
        if name != "rope_parameters" or old[name]["rope_type"] == "default":
            assert new[name] == old[name], name


EXPERTS = {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
           "moe_intermediate_size", "routed_scaling_factor", "num_nextn_predict_layers"}  # fmt: skip


@settings(max_examples=6)
@given(shape=deepseeks(), interleaved=st.booleans())
def test_deepseek_v3(tmp_path_factory, shape, interleaved):
    folder = tmp_path_factory.mktemp("import")
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, rope_interleave=interleaved, num_nextn_predict_layers=0))
    make_folder(folder / "in", theirs)
    assert_same_here(theirs, folder / "in", folder / "run")
    if interleaved:  # the only layout that is exported
        assert_comes_back(folder / "in", folder / "run", folder / "out")


@settings(max_examples=4)
@given(shape=deepseeks())
def test_deepseek_v2(tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("import")
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**shape))
    make_folder(folder / "in", theirs)
    assert_same_here(theirs, folder / "in", folder / "run")
    assert_comes_back(folder / "in", folder / "run", folder / "out")


@settings(max_examples=6)
@given(shape=shapes(), kv_heads=st.sampled_from((1, 2, 4)), bias=st.booleans())
def test_llama(tmp_path_factory, shape, kv_heads, bias):
    folder = tmp_path_factory.mktemp("import")
    kv_heads = min(kv_heads, shape["num_attention_heads"])
    config = LlamaConfig(**shape, num_key_value_heads=kv_heads, attention_bias=bias, mlp_bias=bias)
    theirs = LlamaForCausalLM(config)
    make_folder(folder / "in", theirs)
    assert_same_here(theirs, folder / "in", folder / "run")
    assert_comes_back(folder / "in", folder / "run", folder / "out")


@pytest.mark.parametrize(
    "name", ["mla-low-rank-query", "mla-untied", "mla-yarn", "mha-biases", "mha-part", "gqa-yarn-mscale"]
)
def test_an_export_comes_back_byte_for_byte(tmp_path, name):
    attention, others = MODELS[name]
    make_run(tmp_path / "first", attention, **others)
    export_run(tmp_path / "first", tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "second")
    export_run(tmp_path / "second", tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        if file.name != "README.md":  # an import has no figures
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


DEEPSEEK = {
    **SHARED,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
}
LLAMA = {**SHARED, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12}


@pytest.mark.parametrize(
    "scaling",
    [
        {"mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 16.0},
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale_all_dim": 0.5},
        {"attention_factor": 1.3, "mscale_all_dim": 0.5},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["deepseek", "llama"])
def test_yarn(tmp_path, kind, scaling):
    rope = {"rope_parameters": {**YARN, **scaling}}
    if kind == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**LLAMA, **rope))
    else:
        theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK, **rope))
    make_folder(tmp_path / "in", theirs)
    assert_same_here(theirs, tmp_path / "in", tmp_path / "run")
    assert_comes_back(tmp_path / "in", tmp_path / "run", tmp_path / "out")
    tokens = random_tokens(2, 48)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        torch.testing.assert_close(again, theirs(tokens).logits)


def test_yarn_that_transformers_wrote_before_version_5(tmp_path):
    """DeepSeek-V2's own config.json: rope_scaling with a type and no theta, which stands beside it."""
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**DEEPSEEK))
    make_folder(tmp_path / "in", theirs)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_theta"] = 500
    config["rope_scaling"] = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 12, "beta_fast": 32,
                              "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}  # fmt: skip
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    imported = import_folder(tmp_path / "in", tmp_path / "run").model.attention
    assert imported.yarn == YarnConfig(4.0, 12, 32.0, 1.0, 0.707, 0.707)
    assert imported.rope_base == 500.0


@pytest.mark.parametrize("tied", [True, False])
def test_sharded(tmp_path, tied):
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    make_folder(tmp_path / "in", theirs, max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    assert_same_here(theirs, tmp_path / "in", tmp_path / "run")
    assert_comes_back(tmp_path / "in", tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("kind", ["deepseek", "llama"])
def test_padding_of_the_embedding(tmp_path, capsys, kind):
    """Every token's logit is transformers', here and exported; no row without a token is left, even a likely one."""
    if kind == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 320}, tie_word_embeddings=True))
    else:
        theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**{**DEEPSEEK, "vocab_size": 384}))
    make_folder(tmp_path / "in", theirs)
    import_folder(tmp_path / "in", tmp_path / "run")
    assert f"{theirs.config.vocab_size - VOCABULARY} rows" in capsys.readouterr().out
    ours, _, config = load_run(tmp_path / "run")
    assert config.model.vocab_size == VOCABULARY
    tokens = random_tokens(2, 48)
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert (logits.argmax(-1) >= VOCABULARY).any()  # random rows are as good as the others
        expected = logits[..., :VOCABULARY]
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        loss = ours(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(loss, F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
        export_run(tmp_path / "run", tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    embedding = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]["embedding.weight"]
    assert embedding.untyped_storage().nbytes() == 4 * VOCABULARY * 32


def test_bf16_comes_back_as_bf16(tmp_path):
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16()
    make_folder(tmp_path / "in", theirs)
    import_folder(tmp_path / "in", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", torch.bfloat16)
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


def test_what_ends_a_document(tmp_path, capsys):
    """The first of several eos tokens; without one, the usual token. Another bos is said to be lost."""
    make_folder(tmp_path / "in", LlamaForCausalLM(LlamaConfig(**LLAMA)))
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    capsys.readouterr()
    cases = (([97, 98], None, "a", ""), (97, 98, "a", "begin them with b"), (None, 256, "<|endoftext|>", ""))
    for number, (eos, bos, token, note) in enumerate(cases):
        path.write_text(json.dumps({**config, "eos_token_id": eos, "bos_token_id": bos}))
        run = import_folder(tmp_path / "in", tmp_path / f"run{number}")
        assert run.data.tokenizer.end_of_text == token
        said = capsys.readouterr().out
        assert note in said
        assert bool(note) == bool(said)


def test_a_context_of_any_length_can_be_evaluated(tmp_path):
    """Longer and shorter than tokens_per_step, which must be a multiple of it."""
    for length in (7, 48, 3000):
        make_folder(
            tmp_path / f"in{length}", LlamaForCausalLM(LlamaConfig(**{**LLAMA, "max_position_embeddings": length}))
        )
        config = import_folder(tmp_path / f"in{length}", tmp_path / f"run{length}")
        config.check()
        assert config.micro_batch_size == max(1, math.floor(2048 / length))
