"""The tokens that a run trains on."""

from tokenizers import Tokenizer

from mla_lm.data.config import MIXTURE, DataConfig
from mla_lm.data.mixture import open_mixture
from mla_lm.data.store import TokenStore, open_corpus_store


def open_store(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenStore:
    """The tokens of the text that `config` names, of one corpus or a mixture: from the cache, or built now.

    Args:
        tokenizer: takes the place of the one `config.tokenizer` describes, for instance that of an earlier run

    Raises:
        UserError: a mistake in the files, the tokenizer or the cache folder.
    """
    return open_mixture(config, tokenizer) if config.source == MIXTURE else open_corpus_store(config, tokenizer)
