"""The text that a run is measured on: a split of its own data, or any files."""

import numpy as np
from tokenizers import Tokenizer

from mla_lm.config import TrainConfig
from mla_lm.data.file_formats import check_format, read_file
from mla_lm.data.open_store import open_store
from mla_lm.data.shards import Tokens
from mla_lm.data.text_files import find_files
from mla_lm.data.tokenizer import encode, end_of_text_id
from mla_lm.errors import UserError
from mla_lm.runs.checkpoint import load_checkpoint
from mla_lm.runs.folder import find_best
from mla_lm.runs.trust import with_agreed_paths


def tokens_of_split(run: str, split: str, tokenizer: Tokenizer, config: TrainConfig, trusted: bool = False) -> Tokens:
    """The tokens of a split of the data that the run was trained on.

    Raises:
        UserError: the data have changed; or the run was made elsewhere, names files, and is not `trusted`.
    """
    folder, checkpoint = find_best(run)
    fingerprint = load_checkpoint(checkpoint).get("data_fingerprint")
    if fingerprint is None:
        raise UserError(f"{run} was imported, so it has no data of its own: give --files")
    data = with_agreed_paths(config, folder, trusted, "agree with --trust").data
    store = open_store(data, tokenizer if config.init_from else None)
    if store.fingerprint != fingerprint:
        raise UserError(f"the data of {run} have changed since ({store.description}): restore them, or give --files")
    return store.tokens(split)


def tokens_of_files(files: str, column: str, tokenizer: Tokenizer, config: TrainConfig) -> np.ndarray:
    """The tokens, (count,), of all documents in the files, each followed by the end-of-text token.

    Raises:
        UserError: a file is missing, cannot be read as text, or lacks the column.
    """
    end = end_of_text_id(tokenizer, config.data.tokenizer.end_of_text)
    tokens: list[int] = []
    try:
        paths, _ = find_files(files)
        for path in paths:
            check_format(path)
            for text, ends in read_file(path, column):
                tokens += encode(tokenizer, text) + [end] * ends
    except UserError as error:  # it names keys of a configuration, but here these are options
        raise UserError(str(error).replace("data.column", "--column").replace("data.files", "--files")) from error
    return np.array(tokens)
