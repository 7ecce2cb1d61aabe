"""Whose word counts for the paths in a run's config.yaml.

A configuration names files that are read and a folder that copies of their text are written to. Of a run that this user
made these are the user's own words. A run of somebody else could name anything: a private file, or a folder that others
see. So whatever makes a run signs its paths with a key that only this user has, and whoever is about to open them asks
here first. Where the signature is missing or does not fit, the paths are used only if the user says so. Weights,
tokenizer and figures lie in the run folder itself, and need no such word.

The signature is HMAC-SHA256 of the paths, in the file `origin` of the run folder, which may be moved. The key is
mla_lm/key in $XDG_CONFIG_HOME, by default ~/.config.
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
MOST_NAMED = 5  # paths in a message


def paths_wanted(config: TrainConfig) -> dict[str, Any]:
    """By dotted keys, what a configuration has opened: files, folders, and names on the Hub.

    A name on the Hub is among them because a folder of that name in the working directory takes its place.
    """
    named = {key: getattr(owner, own.name) for key, owner, own in paths(config)}
    return {key: path for key, path in named.items() if path}


def sign(run: RunFolder, config: TrainConfig) -> None:
    """Write down that the paths in `config`, the run's configuration, are this user's own word."""
    try:
        signature = _signature(config)
    except UserError as error:
        say(f"note        this run is not signed, so using its data again will need your word: {error}")
        return
    write_atomically(run.origin_file, lambda file: file.write(signature + b"\n"))


def is_signed(run: RunFolder) -> bool:
    """Whether the paths in its config.yaml are those that this user signed."""
    try:
        with open(run.origin_file, "rb") as file:
            signature = file.read(1000).strip()
        return hmac.compare_digest(signature, _signature(run.config()))
    except (OSError, UserError):
        return False


def check_links(run: RunFolder) -> None:
    """Raises UserError where what is written in a run of somebody else would be written elsewhere, through a link."""
    if is_signed(run):
        return
    for path in (run.last.parent, *run.path.iterdir(), *run.last.parent.glob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link, in a run that was not made here by you: put a copy in its place")


def with_agreed_paths(
    config: TrainConfig, run: RunFolder, agreed: bool, how: str, own: TrainConfig | None = None
) -> TrainConfig:
    """The run's configuration, where its paths may be opened.

    Where the only foreign one is the folder of the token cache, this user's own takes its place.

    Args:
        config: the run's, less what this user has changed
        agreed: whether this user has said that its paths may be opened
        how: to say so
        own: paths that are this user's word in any case, absolute; None: the cache in the working directory alone

    Raises:
        UserError: naming the paths.
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
    """The key of this user, made when it is first asked for.

    Raises:
        UserError: there is no place for it that is this user's alone.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if not os.path.isabs(home):
        raise UserError("you have no home folder for a key: set XDG_CONFIG_HOME to a folder of yours")
    path = private_folder(Path(home) / "mla_lm") / "key"
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # several runs may begin at once
        if not path.is_file() or path.stat().st_size != KEY_BYTES:  # new, or cut short by a kill
            path.unlink(missing_ok=True)
            with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(secrets.token_bytes(KEY_BYTES))
        check_private(path)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be used: {error.strerror}") from error
    finally:
        os.close(folder)  # and with it the lock
