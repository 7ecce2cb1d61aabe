"""scripts.import_hf: what one does with an imported run, and every folder that is refused."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from mla_lm import load_run
from mla_lm.data.tokenizer import load_tokenizer
from mla_lm.terminal import cli
from scripts import evaluate, export, generate, import_hf
from tests.conftest import Result, call_main, refused, succeeded, summary_of
from tests.interop.hf.models import TOKENIZER, make_folder, tensors
from tests.interop.hf.test_import import DEEPSEEK, LLAMA


def call(folder, *arguments: str, program=import_hf) -> Result:
    return call_main(lambda: cli.run(program.main), [program.__name__, *arguments], folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    make_folder(folder / "deepseek", DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)))
    make_folder(folder / "llama", LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)))
    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of one of them to spoil."""

    def copied(name: str) -> Path:
        return shutil.copytree(folders / name, tmp_path / "in")

    return copied


@pytest.mark.parametrize("name", ["deepseek", "llama"])
def test_use(train, folders, tmp_path, name):
    """Sampled, evaluated on files, fine-tuned; a split of its own it has not, nor a training to go on with."""
    assert "init_from=run" in succeeded(call(tmp_path, str(folders / name), "run")).stdout
    succeeded(call(tmp_path, "run", "--prompt", "def ", "--max-tokens", "4", program=generate))
    (tmp_path / "text.txt").write_text("def main():\n    return None\n" * 9)
    succeeded(call(tmp_path, "run", "--files", "text.txt", program=evaluate))
    refused(call(tmp_path, "run", program=evaluate), "run", "--files")
    refused(train.bare(f"ckpt_path={tmp_path / 'run'}"), "init_from")
    few = ("trainer.max_steps=2", "val_every_n_steps=2", "tokens_per_step=192", "trainer.accelerator=cpu",
           "trainer.precision=32-true", "logger=none", "compile=false", "samples.max_tokens=2",
           "optimizer.lr=1e-9", "data.val_tokens=512")  # fmt: skip
    data = [override for override in train.data if "tokenizer" not in override]
    succeeded(train.bare(f"init_from={tmp_path / 'run'}", "hydra.run.dir=tuned", *few, *data))
    assert summary_of(tmp_path / "tuned")["attention"] == ("mla" if name == "deepseek" else "mha")
    imported, tuned = (load_run(tmp_path / run)[0].state_dict() for run in ("run", "tuned"))
    for key in imported:
        torch.testing.assert_close(tuned[key], imported[key], rtol=0, atol=1e-6)
    succeeded(call(tmp_path, "tuned", "out", program=export))


def change(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(entries)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "entries", "words"),
    [
        ("llama", {"model_type": "qwen3"}, ["model_type=qwen3", "llama"]),
        ("llama", {"head_dim": 24}, ["head_dim=24", "16"]),
        ("llama", {"attention_bias": True}, ["attention_bias=True"]),
        ("llama", {"mlp_bias": True}, ["attention_bias=False"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act=gelu", "silu"]),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ("llama", {"num_key_value_heads": 3}, ["num_heads=2", "num_kv_heads=3"]),
        ("llama", {"hidden_size": None}, ["hidden_size=None"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["RoPE", "llama3"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["RoPE", "linear"]),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate=False"]),
        ("llama", {"vocab_size": 300}, ["model.embed_tokens.weight", "[257, 32]", "[300, 32]"]),
        ("llama", {"intermediate_size": 25}, ["model.layers.0.mlp.gate_proj.weight", "[24, 32]", "[25, 32]"]),
        ("llama", {"num_hidden_layers": 3}, ["model.layers.2.", "missing"]),
        ("llama", {"num_hidden_layers": 1}, ["model.layers.1.", "no place"]),
        ("llama", {"eos_token_id": 999}, ["eos_token_id=999", "tokenizer.json"]),
        ("deepseek", {"first_k_dense_replace": 1}, ["first_k_dense_replace=1", "mixtures of experts"]),
        ("deepseek", {"attention_bias": True}, ["attention_bias=True"]),
        ("deepseek", {"num_key_value_heads": 1}, ["num_key_value_heads=1"]),
        ("deepseek", {"q_lora_rank": 0}, ["q_lora_rank=0"]),
        ("deepseek", {"qk_rope_head_dim": 7}, ["rope_dim=7", "even"]),
        ("deepseek", {"tie_word_embeddings": True}, ["tie_word_embeddings", "lm_head.weight"]),
    ],
    ids=str,
)
def test_what_our_model_cannot_be(copy, tmp_path, name, entries, words):
    change(copy(name), **entries)
    refused(call(tmp_path, "in", "run"), "in", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Tensors of the file in the place of others, or none at all."""
    kept = {name: tensor for name, tensor in {**tensors(folder), **changes}.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, ["model.norm.weight", "missing"]),
        ({"model.embed_tokens.weight": None}, ["model.embed_tokens.weight", "missing"]),
        ({"model.norm.weight": torch.ones(31)}, ["model.norm.weight", "[31]", "[32]"]),
        ({"model.extra.weight": torch.ones(3)}, ["model.extra.weight", "no place"]),
        ({"lm_head.weight": torch.ones(257, 32)}, ["lm_head.weight", "tie_word_embeddings"]),
    ],
    ids=["missing", "missing embedding", "misshapen", "extra", "untied"],
)
def test_tensors_that_do_not_fit(copy, tmp_path, changes, words):
    rewrite(copy("llama"), **changes)
    refused(call(tmp_path, "in", "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_pickle(copy, tmp_path):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(call(tmp_path, "in", "run"), "pytorch_model.bin", "pickle", "model.safetensors")


def test_no_weights(copy, tmp_path):
    (copy("llama") / "model.safetensors").unlink()
    refused(call(tmp_path, "in", "run"), "model.safetensors")


def test_a_missing_shard(copy, tmp_path):
    folder = copy("llama")
    index = {"weight_map": dict.fromkeys(tensors(folder), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(call(tmp_path, "in", "run"), "model-00001-of-00001.safetensors", "missing or damaged")


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", "x"), ("tokenizer.json", "{}"), ("config.json", "[1]"), ("config.json", "{")],
)
def test_a_damaged_file(copy, tmp_path, name, content):
    (copy("llama") / name).write_text(content)
    refused(call(tmp_path, "in", "run"), name)


@pytest.mark.parametrize("size", [10**12, 10**30])
@pytest.mark.parametrize(
    "name",
    ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings",
     "num_attention_heads"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_sizes_that_no_memory_holds(copy, tmp_path, kind, name, size):
    """Neither memory nor time is spent on them: a loop over that many layers would not end."""
    change(copy(kind), **{name: size}, first_k_dense_replace=size, num_key_value_heads=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(call(tmp_path, "in", "run"), "in")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000 * 1024


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "yarn", "factor": "much"}},
        {"rms_norm_eps": []},
        {"rope_theta": "x", "rope_parameters": None},
        {"eos_token_id": "a"},
        {"eos_token_id": []},
        {"bos_token_id": -1},
        {"eos_token_id": 10**12},
    ],
    ids=str,
)
def test_entries_of_another_type(copy, tmp_path, changes):
    change(copy("llama"), **changes)
    refused(call(tmp_path, "in", "run"), "config.json" if "token_id" in str(changes) else "in: config.json")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "in/model.safetensors", "weights.bin", 3, None]
)
def test_an_index_that_names_files_elsewhere(copy, tmp_path, name):
    folder = copy("llama")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(call(tmp_path, "in", "run"), f"{name}", "index.json")


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "{}", "[" * 100_000])
def test_an_index_that_is_none(copy, tmp_path, content):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    refused(call(tmp_path, "in", "run"), "index.json")


@pytest.mark.parametrize("header", [2**63, 2**40, 10**8 + 1, 0])
def test_a_header_of_absurd_length(copy, tmp_path, header):
    path = copy("llama") / "model.safetensors"
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(call(tmp_path, "in", "run"), "model.safetensors", "damaged")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_files_that_are_absurdly_large(copy, tmp_path, name):
    os.truncate(copy("llama") / name, 2**40)  # with nothing in it
    refused(call(tmp_path, "in", "run"), name, "bytes")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_files_that_are_nested_without_end(copy, tmp_path, name):
    (copy("llama") / name).write_text('{"a":' * 100_000)
    refused(call(tmp_path, "in", "run"), name)


def test_a_token_with_an_absurd_id(copy, tmp_path):
    path = copy("llama") / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"]["zzzz"] = 2**32 - 1
    path.write_text(json.dumps(described))
    refused(call(tmp_path, "in", "run"), "entries")


def test_no_model_folder(tmp_path):
    refused(call(tmp_path, "nothing", "run"), "nothing", "config.json")
    refused(call(tmp_path, ".", "run"), "no model folder")


def test_no_tokenizer(copy, tmp_path):
    (copy("llama") / "tokenizer.json").unlink()
    refused(call(tmp_path, "in", "run"), "tokenizer.json", "save_pretrained")


def test_another_tokenizer(copy, tmp_path):
    folder = copy("llama")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokenizer.add_tokens(["more"])
    tokenizer.save(str(folder / "tokenizer.json"))
    refused(call(tmp_path, "in", "run"), "vocab_size=257", "258")
    assert TOKENIZER.get_vocab_size() == 257


def test_a_tokenizer_of_far_fewer_entries(tmp_path):
    make_folder(tmp_path / "in", LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 257 + 1025})))
    refused(call(tmp_path, "in", "run"), "vocab_size=1282", "257")


def test_where_something_is_already(folders, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    refused(call(tmp_path, str(folders / "llama"), "run"), "run", "not empty")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
