"""Opens the tokens that a run trains on."""

from tokenizers import Tokenizer

from mla_lm.data.config import MIXTURE, DataConfig
from mla_lm.data.mixture import open_mixture
from mla_lm.data.store import TokenStore, open_corpus_store


def open_store(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenStore:
    """Open the token store of the corpus or mixture that `config` names, from the cache; build it if needed.

    Args:
        tokenizer: replaces the one that `config.tokenizer` describes, for instance by that of an earlier run

    Raises:
        UserError: the files, the tokenizer or the cache folder cannot be used.
    """
    return open_mixture(config, tokenizer) if config.source == MIXTURE else open_corpus_store(config, tokenizer)
