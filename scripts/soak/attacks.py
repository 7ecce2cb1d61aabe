"""Runs, checkpoints and model folders as somebody makes them who wants code run, or a secret, where they are opened.

Each attack changes `folder`/run or `folder`/model, which are whole before it. Code that is run makes `folder`/canary.
"""

import functools
import importlib
import json
import operator
import os
import pickle
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from mla_lm.runs.checkpoint import load_checkpoint

CANARY = "canary"
SECRET_NAME = "SOAK_SECRET"  # of the environment variable
SECRET = f"secret-{os.urandom(8).hex()}"


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def touch(folder: Path) -> str:
    return f"touch {folder / CANARY}"


def code(folder: Path) -> str:
    return f"open({str(folder / CANARY)!r}, 'w')"


def torch_load(folder: Path) -> Calls:
    (folder / "inner.pkl").write_bytes(pickle.dumps(Calls(os.system, touch(folder))))
    return Calls(functools.partial(torch.load, str(folder / "inner.pkl"), weights_only=False))


def torch_hub(folder: Path) -> Calls:
    (folder / "hubconf.py").write_text(f"def model():\n    {code(folder)}\n")
    return Calls(functools.partial(torch.hub.load, str(folder), "model", source="local", trust_repo=True))


def nested(folder: Path) -> Calls:
    return Calls(operator.methodcaller("system", touch(folder)), Calls(importlib.import_module, "os"))


def allowed_first(folder: Path) -> list[Calls]:
    return [Calls(torch.serialization.add_safe_globals, [os.system]), Calls(os.system, touch(folder))]


PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda folder: Calls(os.system, touch(folder)),
    "subprocess": lambda folder: Calls(subprocess.call, touch(folder).split()),
    "eval": lambda folder: Calls(eval, code(folder)),
    "exec": lambda folder: Calls(exec, code(folder)),
    "torch.load": torch_load,
    "torch.hub.load": torch_hub,
    "nested": nested,
    "add_safe_globals": allowed_first,
}


def in_checkpoints(folder: Path, payload: str, place: str | None, zipped: bool = True) -> None:
    """A payload at a place of every checkpoint of the run; without a place it is the checkpoint."""
    spoiled = PAYLOADS[payload](folder)
    for file in (folder / "run" / "checkpoints").iterdir():
        content = {**load_checkpoint(file), place: spoiled} if place else spoiled
        torch.save(content, file, _use_new_zipfile_serialization=zipped)


def plain_pickles(folder: Path) -> None:
    for file in (folder / "run" / "checkpoints").iterdir():
        file.write_bytes(pickle.dumps(PAYLOADS["os.system"](folder)))


def class_names(folder: Path) -> None:
    """Plain data that has been read as classes to make, by Lightning and by Hydra."""
    names = ("class_path", "_instantiator", "_target_", "hparams_type")
    attack = {**dict.fromkeys(names, "os.system"), "_args_": [touch(folder)]}
    for file in (folder / "run" / "checkpoints").iterdir():
        torch.save({**load_checkpoint(file), "hyper_parameters": attack, **attack}, file)


def in_config(folder: Path, old: str, new: str) -> None:
    """config.yaml with one text for another."""
    file = folder / "run" / "config.yaml"
    before, found, after = file.read_text().partition(old)
    assert found, old
    file.write_text(before + new.replace("COMMAND", touch(folder)) + after)


def in_tokenizers(folder: Path, content: bytes | Callable[[dict], object]) -> None:
    """tokenizer.json of the run and of the model folder."""
    for file in (folder / "run" / "tokenizer.json", folder / "model" / "tokenizer.json"):
        if callable(content):
            described = json.loads(file.read_text())
            content(described)
            content = json.dumps(described).encode()
        file.write_bytes(content)


def huge_id(tokenizer: dict) -> None:
    tokenizer["added_tokens"][0]["id"] = 2**32 - 2


def in_summary(folder: Path) -> None:
    text = f"$({touch(folder)}) `{touch(folder)}` {ENVIRONMENT} =cmd|' /C {touch(folder)}'!A0"
    update(folder / "run" / "summary.json", {"attention": text, "git_commit": text})


def remote_code(folder: Path) -> None:
    """What transformers runs with trust_remote_code."""
    (folder / "model" / "modeling_evil.py").write_text(f"class Evil:\n    {code(folder)}\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    attack = {
        "auto_map": dict.fromkeys(classes, "modeling_evil.Evil"),
        "trust_remote_code": True,
        "chat_template": "{{ cycler.__init__.__globals__.os.environ }}",
        "_name_or_path": ENVIRONMENT,
    }
    for name in ("config.json", "tokenizer_config.json"):
        update(folder / "model" / name, attack)


def pickled_weights(folder: Path, indexed: bool) -> None:
    (folder / "model" / "model.safetensors").unlink()
    torch.save(PAYLOADS["os.system"](folder), folder / "model" / "pytorch_model.bin")
    if indexed:
        write_index(folder, "pytorch_model.bin")


def weights_elsewhere(folder: Path, absolute: bool) -> None:
    """An index that names a file outside the folder."""
    (folder / "model" / "model.safetensors").rename(folder / "outside.safetensors")
    write_index(folder, str(folder / "outside.safetensors") if absolute else "../outside.safetensors")


def write_index(folder: Path, file: str) -> None:
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))


def update(file: Path, content: dict) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))


ENVIRONMENT = f"${{oc.env:{SECRET_NAME}}}"
TARGET = "_target_: os.system\n_args_: ['COMMAND']\n"
APPLY = "!!python/object/apply:os.system ['COMMAND']"
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "garbage as a tokenizer": partial(in_tokenizers, content=bytes(range(256)) * 9),
    "a pickle as a tokenizer": partial(in_tokenizers, content=pickle.dumps(Calls(print, "unpickled"))),
    "a deep tokenizer": partial(in_tokenizers, content=b'{"model":' * 10**5),
    "a tokenizer with a huge id": partial(in_tokenizers, content=huge_id),
}
RUNS: dict[str, Callable[[Path], None]] = {
    **{f"{name} in a checkpoint": partial(in_checkpoints, payload=name, place="state_dict") for name in PAYLOADS},
    "os.system as a checkpoint": partial(in_checkpoints, payload="os.system", place=None),
    "os.system in optimizer_states": partial(in_checkpoints, payload="os.system", place="optimizer_states"),
    "os.system in callbacks": partial(in_checkpoints, payload="os.system", place="callbacks"),
    "os.system in an old archive": partial(in_checkpoints, payload="os.system", place="state_dict", zipped=False),
    "a pickle as a checkpoint": plain_pickles,
    "class names in a checkpoint": class_names,
    "_target_ in config.yaml": partial(in_config, old="seed:", new=f"{TARGET}seed:"),
    "_target_ in a group": partial(in_config, old="samples:", new=f"samples:\n{indent(TARGET, '  ')}"),
    "a YAML tag": partial(in_config, old="tags: []", new=f"tags: {APPLY}"),
    "a secret among tags": partial(in_config, old="tags: []", new=f"tags: ['{ENVIRONMENT}']"),
    "a secret in data.files": partial(in_config, old="  files: ", new=f"  files: {ENVIRONMENT}"),
    "a secret in data.column": partial(in_config, old="  column: text", new=f"  column: {ENVIRONMENT}"),
    "a secret in data.cache_dir": partial(in_config, old="  cache_dir: ", new=f"  cache_dir: {ENVIRONMENT}"),
    "a secret in a prompt": partial(in_config, old="  prompts: []", new=f"  prompts: ['{ENVIRONMENT}']"),
    "a secret as a logger": partial(in_config, old="  project: mla-lm", new=f"  project: {ENVIRONMENT}"),
    "a secret as a number": partial(in_config, old="seed: 1", new=f"seed: ${{oc.decode:{ENVIRONMENT}}}"),
    "commands in summary.json": in_summary,
    **TOKENIZERS,
}
MODELS: dict[str, Callable[[Path], None]] = {
    "remote code in config.json": remote_code,
    "pickled weights": partial(pickled_weights, indexed=False),
    "pickled weights in an index": partial(pickled_weights, indexed=True),
    "an index with ../": partial(weights_elsewhere, absolute=False),
    "an index with another folder": partial(weights_elsewhere, absolute=True),
    **TOKENIZERS,
}
