"""Finds out quickly whether the Hugging Face Hub can be reached, and works from its cache if not.

Without a network, the Hub's libraries retry for half a minute before they fail.
"""

import contextlib
import queue
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mla_lm.errors import UserError

PATIENCE = 2.0  # seconds to wait for a connection, far more than a working network needs


def reach_hub() -> Callable[[], bool]:
    """Start to connect, and return a function that waits for the answer, for `PATIENCE` from now at most."""
    answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
    deadline = time.monotonic() + PATIENCE
    # in a thread, since a name lookup has no timeout
    threading.Thread(target=lambda: answer.put(_connects()), daemon=True).start()

    def reached() -> bool:
        try:
            return answer.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            return False

    return reached


def _connects() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    target = urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.netloc):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def from_cache_only(only: bool) -> Iterator[None]:
    """Work offline, if `only`, as with HF_HUB_OFFLINE=1, which the libraries have read already on import."""
    from huggingface_hub import constants

    settings: list[Any] = [constants]
    if "datasets.config" in sys.modules:
        settings.append(sys.modules["datasets.config"])
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = only or module.HF_HUB_OFFLINE
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json of a folder or of a model on the Hub; it is downloaded only if no version is cached.

    Raises:
        UserError: the model has none, or it is not cached and the Hub cannot be reached.
    """
    if (folder := Path(path).expanduser()).is_dir():
        return folder / "tokenizer.json"
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    try:
        if isinstance(cached := try_to_load_from_cache(path, "tokenizer.json"), str):
            return Path(cached)
        if not reach_hub()():
            raise UserError(
                f"data.tokenizer.path={path} is no folder and not in the cache {constants.HF_HUB_CACHE}, "
                f"and {constants.ENDPOINT} cannot be reached.\n"
                "  data.tokenizer.kind=bpe, bytes and characters need no network"
            )
        return Path(hf_hub_download(path, "tokenizer.json"))
    except UserError:
        raise
    except Exception as error:  # from several libraries
        raise UserError(
            f"data.tokenizer.path={path} has no tokenizer.json that can be had ({f'{error}'.strip().splitlines()[0]}): "
            "give a model on the Hub such as openai-community/gpt2, or a folder with one"
        ) from error
