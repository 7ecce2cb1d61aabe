"""A run as a folder that `transformers` loads, and such a folder as a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, processors
from torch import Tensor

from mla_lm.config import TrainConfig
from mla_lm.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size
from mla_lm.errors import UserError
from mla_lm.files import check_free, read_text, whole_folder
from mla_lm.interop.hf.card import model_card
from mla_lm.interop.hf.config import from_json, to_json
from mla_lm.interop.hf.weights import from_transformers, to_transformers
from mla_lm.model.config import TransformerConfig
from mla_lm.runs.folder import RunFolder, find_best, write_model
from mla_lm.runs.load import check_tables, load_run
from mla_lm.runs.trust import sign
from mla_lm.terminal.plain_text import say

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_BYTES = 2**26  # of config.json and the index: 500,000 tensors
# An embedding may have so many rows more than the tokenizer has entries: Megatron pads to multiples of up to 1,024, and
# DeepSeek-V2 by 2.4%. With more, the tokenizer is another model's.
PADDING_ROWS, PADDING_SHARE = 1024, 0.05


def export_run(path: str | Path, out: Path, dtype: torch.dtype = torch.float32) -> TrainConfig:
    """Write the best checkpoint of a run, or the checkpoint named, for `AutoModelForCausalLM.from_pretrained(out)`.

    Returns:
        the run's configuration

    Raises:
        UserError: there is no run, `out` has something in it, or the model cannot be a DeepseekV3 or Llama.
    """
    check_free(out)
    run, checkpoint = find_best(path)
    model, tokenizer, config = load_run(path)
    summary = run.summary()
    if checkpoint != run.best:  # whose figures those of the two splits are
        summary = {key: value for key, value in summary.items() if not key.startswith(("val_", "test_"))}
    end = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
    described = to_json(model.config, end, str(dtype).removeprefix("torch."))
    weights = {name: tensor.to(dtype) for name, tensor in to_transformers(model).items()}
    with whole_folder(out) as draft:
        (draft / WEIGHTS).write_bytes(save(weights, {"format": "pt"}))  # transformers 4 refuses a file without format
        _write_json(draft / "config.json", described)
        ids = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(draft / "generation_config.json", ids)
        _write_tokenizer(draft, tokenizer, end, model.config.seq_len)
        (draft / "README.md").write_text(model_card(summary, config, described))
    return config


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, end: int, seq_len: int) -> None:
    """Write the files that AutoTokenizer reads. It encodes as ours, with the document's first token in front."""
    token = tokenizer.id_to_token(end)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, end)]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    special = {"bos_token": token, "eos_token": token, "pad_token": token}
    _write_json(folder / "special_tokens_map.json", special)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": True,  # read by llama.cpp; the others follow tokenizer.json
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would give token_type_ids as well
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens are never found in text
    }
    _write_json(folder / "tokenizer_config.json", described)


def import_folder(source: Path, out: Path) -> TrainConfig:
    """Make a run of a model of transformers: `train.py init_from=` begins from it, and all tools but compare take it.

    Its checkpoint is last.ckpt with nothing but the weights, in fp32, as there is no training to go on with.

    Rows of the embedding and the head beyond the tokenizer's entries, which are there to make up a multiple of 64 or
    128, are left out. Every token then has the logit that it has in transformers, while the probabilities are shared
    among tokens that exist: nothing else is sampled, and the loss is less by what the padding had of the softmax. An
    export has as many rows as the tokenizer has entries.

    Returns:
        the run's configuration

    Raises:
        UserError: `source` is no model folder or holds what our model cannot be; `out` has something in it.
    """
    check_free(out)
    described = _read_json(source / "config.json", f"{source} is no model folder: it has no config.json")
    try:
        model, interleaved = _model_of(described)
        state = from_transformers(_read_weights(source), model, interleaved)
        check_tables(model)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    rows = len(state["embedding.weight"])
    tokenizer = _read_tokenizer(source, rows)
    if padding := rows - vocabulary_size(tokenizer):
        say(f"note        the last {padding:,} rows of the embedding belong to no token, and are left out")
        model = _without_padding(model, state, vocabulary_size(tokenizer))
    config = TrainConfig(model=model)
    config.tokens_per_step = model.seq_len * max(1, config.sequences_per_step)
    config.trainer.precision = "32-true"
    config.data.tokenizer.kind = "file"
    config.data.tokenizer.file = str(RunFolder(out.absolute()).tokenizer_file)
    config.data.tokenizer.end_of_text = _end_of_text(described, tokenizer)
    write_model(out, config, tokenizer, {"state_dict": state})
    sign(RunFolder(out), config)
    return config


def _model_of(described: dict[str, Any]) -> tuple[TransformerConfig, bool]:
    """Call `from_json` on untrusted content, and turn whatever it raises into a UserError."""
    try:
        return from_json(described)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json has an entry that cannot be: {error}") from error


def _read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: save its tokenizer with transformers' save_pretrained first")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    entries = vocabulary_size(tokenizer)
    if not 0 <= vocab_size - entries <= max(PADDING_ROWS, PADDING_SHARE * entries):
        raise UserError(f"{folder}: vocab_size={vocab_size}, but tokenizer.json has {entries} entries")
    return tokenizer


def _without_padding(model: TransformerConfig, state: dict[str, Tensor], entries: int) -> TransformerConfig:
    """Cut the embedding and the head of `state` to this many rows, and describe the model that is left."""
    state["embedding.weight"] = state["embedding.weight"][:entries].clone()  # a view would be saved with all rows
    state["head.weight"] = state["embedding.weight"] if model.tie_embeddings else state["head.weight"][:entries].clone()
    return replace(model, vocab_size=entries)


def _end_of_text(described: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Name of the token that ends a document: the first of config.json's eos_token_id, else one of the usual ones."""
    eos, bos = described.get("eos_token_id"), described.get("bos_token_id")
    eos: Any = eos[0] if isinstance(eos, list) and eos else eos
    for name, token in (("eos_token_id", eos), ("bos_token_id", bos)):
        if not (token is None or (isinstance(token, int) and 0 <= token < 2**32)):
            raise UserError(f"{name}={token} of config.json is no token")
    end = tokenizer.id_to_token(end_of_text_id(tokenizer) if eos is None else eos)
    if end is None:
        raise UserError(f"eos_token_id={eos} of config.json is not in tokenizer.json")
    if bos is not None and (begin := tokenizer.id_to_token(bos)) not in (None, end):
        say(f"note        texts begin after {end} here; this model learned to begin them with {begin}")
    return end


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index names."""
    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file():
        if any(folder.glob("pytorch_model*.bin*")) and not (folder / INDEX).is_file():
            raise UserError("pytorch_model.bin is a pickle, which can run code: give the weights as model.safetensors")
        index = _read_json(folder / INDEX, f"there is no {WEIGHTS}, nor {INDEX}")
        files = _names(index.get("weight_map"))
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{name} is missing or damaged: {error}") from error
    return tensors


def _names(weight_map: Any) -> set[str]:
    """Files that an index names, which must be in its own folder."""
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in names:
        if not (isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name):
            raise UserError(f"{INDEX} names {name}, which is no .safetensors file of this folder")
    if not names:
        raise UserError(f"{INDEX} names no files")
    return set(names)


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(missing)
    try:
        content = json.loads(read_text(path, JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
