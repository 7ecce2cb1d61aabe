"""Rewords errors of `datasets` and the libraries below it for the user."""

import contextlib
import re
from collections.abc import Iterator

from mla_lm.data.config import CorpusConfig
from mla_lm.errors import UserError


@contextlib.contextmanager
def explained(config: CorpusConfig) -> Iterator[None]:
    """A context that turns any error of these libraries into a UserError that names the key to change."""
    try:
        yield
    except Exception as error:
        for cause in (error, error.__cause__, error.__context__):  # our code may have raised it within theirs
            if isinstance(cause, UserError):
                raise cause from None
        raise UserError(_explanation(config, error)) from error


def _explanation(config: CorpusConfig, error: BaseException) -> str:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError

    if isinstance(error, DatasetGenerationError):
        error = error.__cause__ or error  # the cause is the actual error
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, ConnectionError) or "is not cached" in text or "find cache for" in text:
        return _without_network(config)
    configs = re.search(r"(?:Available|available configs): (\[.*\])", text)
    if configs:
        names = ", ".join(re.findall(r"'([^']+)'", configs[1]))
        wrong = f"has no configuration data.name={config.name}: it has" if config.name else "needs data.name, one of"
        return f"{config.path} {wrong} {names}"
    if "scripts are no longer supported" in text:
        return (
            f"data.path={config.path} is made by a Python script of its own, which is never run here: "
            "choose a dataset of Parquet, JSON or text files"
        )
    if isinstance(error, DatasetNotFoundError):
        return (
            f"data.path={config.path}: {first}\n"
            "  a dataset is named as its page on the Hub is, organisation/name; a private one needs `hf auth login`"
        )
    if isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return f"data.path={config.path} has no files of a dataset (Parquet, JSON, text): {first}"
    return f"data.path={config.path} cannot be read: {first}"


def _without_network(config: CorpusConfig) -> str:
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import ENDPOINT

    name = f" data.name={config.name}" if config.name else ""
    return (
        f"data.path={config.path}{name} is no folder and not in the cache {HF_DATASETS_CACHE}, "
        f"and {ENDPOINT} cannot be reached.\n"
        "  data=python_stdlib and data=text data.files=... need no network"
    )
