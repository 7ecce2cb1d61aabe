"""Where text comes from: a function for each `data.source` that returns the corpus."""

from pathlib import Path

from mla_lm.data.config import DataConfig
from mla_lm.data.corpus import Source
from mla_lm.data.hub import hub_dataset
from mla_lm.data.python_packages import python_packages
from mla_lm.data.python_stdlib import python_stdlib
from mla_lm.data.text_files import character_file, text_files


def open_source(config: DataConfig) -> Source:
    """Find and hash the files that `config` names, without decoding them.

    Raises:
        UserError: files are missing, empty or of an unknown format, or a dataset is not available. Text that cannot be
            decoded, invalid JSON and missing columns raise it only while the documents are read.
    """
    memory = Path(config.cache_dir).expanduser() / "hashes.json"
    if config.source == "python_stdlib":
        return python_stdlib(memory)
    if config.source == "python_packages":
        return python_packages(memory)
    if config.source == "text":
        return text_files(config.files, config.column, memory)
    if config.source == "hub":
        return hub_dataset(config)
    return character_file(config.files, memory)
