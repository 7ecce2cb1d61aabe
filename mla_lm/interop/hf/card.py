"""The model card of an exported run."""

import re
from typing import Any

from mla_lm.attention import KINDS
from mla_lm.config import TrainConfig
from mla_lm.interop.hf.engines import engines_for
from mla_lm.model.size import model_size
from mla_lm.terminal.plain_text import printable

# Keys of summary.json that the card shows, with their headings and formats.
FIGURES = (
    ("test_perplexity", "perplexity, test", "{:.2f}"),
    ("test_bits_per_byte", "bits per byte, test", "{:.4f}"),
    ("val_perplexity", "perplexity, validation", "{:.2f}"),
    ("val_bits_per_byte", "bits per byte, validation", "{:.4f}"),
    ("tokens_seen", "tokens seen in training", "{:,}"),
    ("kv_cache_bytes_per_token", "KV-cache bytes per token, all layers", "{:,.0f}"),
    ("kv_cache_vs_mha", "of an MHA's of the same width", "{:.3f}"),
    ("precision", "trained in", "{}"),
)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{kind}]
# license: whose text a model learned from decides how it may be passed on, so this line is left to you
---

# A language model with {attention}

{parameters:,} parameters: {layers} layers of {width}, {heads} heads, {context:,} tokens of context, a vocabulary of
{vocabulary:,}. Its KV cache has {cached:,} elements a token and layer. Trained with mla-lm.

| | |
|---|---|
{figures}

## Data

{data}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

It is loaded as {architecture}, without code of its own. It learned that a text begins after the end of
another, so a prompt begins with the end-of-text token: the tokenizer puts it there, as its bos_token, which is also its
eos_token.

| engine | takes it | |
|---|---|---|
{engines}
"""


def model_card(summary: dict[str, Any], config: TrainConfig, described: dict[str, Any]) -> str:
    """README.md of an exported run.

    Args:
        summary: the content of summary.json; empty if the run has none
        described: the content of config.json
    """
    model, size = config.model, model_size(config.model)
    figures = [f"| {heading} | {_figure(summary.get(key), form)} |" for key, heading, form in FIGURES]
    verdicts = [f"| {v.engine} | {v.word} | {'; '.join(v.notes)} |" for v in engines_for(model)]
    return CARD.format(
        kind=size.attention,
        attention=KINDS[size.attention].title,
        parameters=size.parameters,
        layers=model.num_layers,
        width=model.d_model,
        heads=model.num_heads,
        context=model.seq_len,
        vocabulary=model.vocab_size,
        cached=size.cache_elements_per_token_per_layer,
        figures="\n".join(figures),
        data=_data(summary, config),
        architecture=described["architectures"][0],
        engines="\n".join(verdicts),
    )


def _data(summary: dict[str, Any], config: TrainConfig) -> str:
    fingerprint = summary.get("data_fingerprint")
    if fingerprint is None:
        return "Not known: the run has not been trained here, or not to its end."
    data = config.data
    text = "Text files of the one who trained it."  # their paths are private
    if data.source == "python_stdlib":
        text = "The source code of Python's standard library."
    elif data.source == "python_packages":
        text = "The source code of Python packages, which have licences of their own."
    elif data.source == "hub" and HUB_NAME.fullmatch(data.path or ""):  # not a folder
        details = "".join(f", {_code(x)}" for x in (data.name, data.revision) if x)
        text = f"`{data.path}` of the Hugging Face Hub{details}."
    return f"{text}\nFingerprint of text, split and tokenizer: {_code(fingerprint)}."


def _figure(value: Any, form: str) -> str:
    if isinstance(value, int | float):
        return form.format(value)
    return "not measured" if value is None else _code(value).replace("|", r"\|")


def _code(text: Any) -> str:
    """Format text from a run's files as inline Markdown code, which no character in it can end."""
    return "`" + printable(f"{text}").replace("\n", r"\n").replace("`", "'") + "`"
