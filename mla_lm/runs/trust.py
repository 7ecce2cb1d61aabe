"""Decides whether the paths in a run's config.yaml may be opened.

A configuration names files to read, and a folder into which copies of their text are written. In a run that this user
made, the user chose these paths. A run from somebody else could name anything: a private file, or a folder that others
can see. So code that makes a run signs its paths with a key that only this user has, and code that opens them checks
the signature here first. If it is missing or wrong, the paths are used only with the user's consent. Weights, tokenizer
and figures lie in the run folder itself, and need no consent.

The signature is HMAC-SHA256 of the paths, in the file `origin` of the run folder, so the folder may be moved. The key
is mla_lm/key in $XDG_CONFIG_HOME, by default ~/.config.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mla_lm.config import TrainConfig, with_absolute_paths
from mla_lm.errors import UserError
from mla_lm.files import check_private, private_folder, write_atomically
from mla_lm.keys import paths
from mla_lm.runs.folder import RunFolder
from mla_lm.terminal.plain_text import say

KEY_BYTES = 32
CACHE = "data.cache_dir"
MOST_NAMED = 5  # paths in a message at most


def paths_wanted(config: TrainConfig) -> dict[str, Any]:
    """The files, folders and Hub names that a configuration makes the program open, by their dotted keys.

    Hub names are included because a folder of that name in the working directory takes precedence.
    """
    named = {key: getattr(owner, own.name) for key, owner, own in paths(config)}
    return {key: path for key, path in named.items() if path}


def sign(run: RunFolder, config: TrainConfig) -> None:
    """Sign the paths in `config`, the run's configuration, as this user's own."""
    try:
        signature = _signature(config)
    except UserError as error:
        say(f"note        this run is not signed, so using its data again will need your word: {error}")
        return
    write_atomically(run.origin_file, lambda file: file.write(signature + b"\n"))


def is_signed(run: RunFolder) -> bool:
    """Whether this user has signed the paths in the run's config.yaml."""
    try:
        with open(run.origin_file, "rb") as file:
            signature = file.read(1000).strip()
        return hmac.compare_digest(signature, _signature(run.config()))
    except (OSError, UserError):
        return False


def check_links(run: RunFolder) -> None:
    """Raise UserError if a run from somebody else has links, through which writing to it would write elsewhere."""
    if is_signed(run):
        return
    for path in (run.last.parent, *run.path.iterdir(), *run.last.parent.glob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link, in a run that was not made here by you: put a copy in its place")


def with_agreed_paths(
    config: TrainConfig, run: RunFolder, agreed: bool, how: str, own: TrainConfig | None = None
) -> TrainConfig:
    """Return the run's configuration if its paths may be opened.

    If the only foreign path is the token cache, it is replaced by this user's own cache.

    Args:
        config: the run's configuration, with this user's changes
        agreed: whether this user has consented to opening its paths
        how: how to consent, for the error message
        own: a configuration whose absolute paths are always allowed; None: only the cache in the working directory

    Raises:
        UserError: the paths may not be opened; the message names them.
    """
    if agreed or is_signed(run):
        return config
    own = own or with_absolute_paths(TrainConfig())
    ours = paths_wanted(own)
    foreign = {key: path for key, path in paths_wanted(config).items() if ours.get(key) != path}
    if not foreign.keys() - {CACHE}:
        if foreign:
            print(
                f"note        {run.path} was not made here by you: tokens go to {own.data.cache_dir}",
                file=sys.stderr,
            )
        return replace(config, data=replace(config.data, cache_dir=own.data.cache_dir))
    named = [f"{key}={path}" for key, path in foreign.items()]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    raise UserError(
        f"{run.path} was not made here by you, and it asks for files: look at them in its config.yaml, then {how}\n"
        f"  {', '.join(text[:150] for text in named[:MOST_NAMED])}{more}"
    )


def _signature(config: TrainConfig) -> bytes:
    paths = json.dumps(paths_wanted(config), sort_keys=True).encode()
    return hmac.new(_key(), paths, hashlib.sha256).hexdigest().encode()


def _key() -> bytes:
    """Return this user's key, which is made on first use.

    Raises:
        UserError: there is no private folder for it.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if not os.path.isabs(home):
        raise UserError("you have no home folder for a key: set XDG_CONFIG_HOME to a folder of yours")
    path = private_folder(Path(home) / "mla_lm") / "key"
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # several runs may start at once
        if not path.is_file() or path.stat().st_size != KEY_BYTES:  # missing, or truncated by a kill
            path.unlink(missing_ok=True)
            with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(secrets.token_bytes(KEY_BYTES))
        check_private(path)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be used: {error.strerror}") from error
    finally:
        os.close(folder)  # and release the lock
