"""Runs and folders of transformers to move between, with weights that make their logits depend on everything."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from mla_lm import AttentionConfig, Transformer, TransformerConfig
from mla_lm.attention.rope import YarnConfig
from mla_lm.config import TrainConfig
from mla_lm.data.config import TokenizerConfig
from mla_lm.data.tokenizer import build_tokenizer
from mla_lm.files import write_atomically
from mla_lm.runs.folder import RunFolder

disable_progress_bar()

TOKENIZER = build_tokenizer(TokenizerConfig(kind="bytes"), [])
VOCABULARY = 257
END_OF_TEXT = 256
SIZES = {"num_layers": 2, "d_model": 64, "num_heads": 4, "seq_len": 96, "ff_hidden": 96, "vocab_size": VOCABULARY}

SHARP = YarnConfig(4.0, original_seq_len=24, beta_fast=16.0, mscale=1.0, mscale_all_dim=0.5)
MODELS = {
    "mla": (AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=8, nope_dim=8), {}),
    "mla-low-rank-query": (AttentionConfig(kind="mla", kv_compressed_dim=24, q_compressed_dim=20, rope_dim=8), {}),
    "mla-untied": (
        AttentionConfig(kind="mla", kv_compressed_dim=40, q_compressed_dim=12, rope_dim=6, nope_dim=10, value_dim=24),
        {"tie_embeddings": False},
    ),
    "mla-yarn": (AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=16, yarn=SHARP), {}),
    "mla-yarn-odd": (
        AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=16, yarn=YarnConfig(5.0, mscale_all_dim=0.0)),
        {},
    ),
    "mla-eps": (AttentionConfig(kind="mla", kv_compressed_dim=24, rope_dim=8), {"norm_eps": 0.01}),
    "mha": (AttentionConfig(rope_base=500.0), {"norm_eps": 0.01}),
    "mha-biases": (AttentionConfig(), {"use_bias": True, "tie_embeddings": False}),
    "gqa": (AttentionConfig(kind="gqa", num_kv_heads=2), {"tie_embeddings": False}),
    "gqa-yarn": (AttentionConfig(kind="gqa", num_kv_heads=2, yarn=SHARP), {}),
    "gqa-yarn-mscale": (AttentionConfig(kind="gqa", num_kv_heads=2, yarn=YarnConfig(4.0, mscale=0.7)), {}),
    "mha-part": (AttentionConfig(rope_dim=6, rope_base=500.0), {}),
    "gqa-part-yarn": (AttentionConfig(kind="gqa", num_kv_heads=2, rope_dim=8, yarn=SHARP), {}),
    "mqa-no-position": (AttentionConfig(kind="mqa", rope_dim=0), {}),
    "mqa": (AttentionConfig(kind="mqa", num_kv_heads=1), {}),
}


def spread(module: torch.nn.Module) -> None:
    """Weights larger than at initialisation, norms away from 1, biases away from 0."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)


def make_run(path: Path, attention: AttentionConfig, **others: object) -> Transformer:
    """A run folder, as one that was trained on bytes looks like; returns its model."""
    config = TrainConfig(model=TransformerConfig(**{**SIZES, **others}, attention=attention))
    config.trainer.precision = "32-true"
    model = Transformer(config.model).eval()
    spread(model)
    run = RunFolder(path)
    write_atomically(run.best, lambda file: torch.save({"state_dict": model.state_dict()}, file))
    run.write_config(config)
    run.write_tokenizer(TOKENIZER)
    return model


def make_folder(path: Path, theirs: torch.nn.Module, **saving: object) -> torch.nn.Module:
    """What transformers' own save_pretrained writes of a model and a tokenizer."""
    spread(theirs)
    theirs.eval().save_pretrained(path, **saving)
    TOKENIZER.save(str(path / "tokenizer.json"))
    return theirs


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
