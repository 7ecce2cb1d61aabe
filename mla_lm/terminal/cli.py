"""The one place that turns a user's mistake into one message and exit status 2."""

import argparse
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, NoReturn, cast

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mla_lm.errors import Interrupted, TrainingFailed, UserError
from mla_lm.keys import flatten, key_names, nearest
from mla_lm.terminal.plain_text import say

MOST_LINES, LONGEST_LINE = 3, 1000
# What OmegaConf says of a value of the wrong type, and what a key with that type takes.
TAKES = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "not a valid bool": "true or false",
    "not a ListConfig": "a list, such as [a,b]",
    "not a subclass of": "keys of its own, each with a value",
}
EXPLAINED = (UserError, TrainingFailed, HydraException, OmegaConfBaseException)  # `report` has words for all of them

# Options of Hydra's own groups that another package brings, and what to install.
PLUGINS = {
    "hydra/sweeper=optuna": 'hydra-optuna-sweeper==1.3.0 "sqlalchemy<2"',
    "hydra/launcher=joblib": "hydra-joblib-launcher==1.2.0",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher==1.2.0",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher==1.2.0",
}


def run(main: Callable[[], object], schema: type | None = None) -> NoReturn:
    """Call `main` and end the process: status 0, 2 for a user's mistake, 1 for a failure, 128 + n for signal n.

    Args:
        main: the program
        schema: dataclass of the configuration's keys, for a Hydra program: an unknown key is answered with the
            nearest one it has
    """
    try:
        main()
    except EXPLAINED as error:
        sys.exit(report(error, schema))
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        say("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # what the operating system says of a path that a user named
        if error.filename is None:
            raise
        sys.exit(report(error))
    sys.exit(0)


def report(error: Exception, schema: type | None = None) -> int:
    """Print what went wrong on stderr, in at most three lines, and return the exit status it calls for."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        message = explain_hydra(error, schema)
    elif isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error)
    sys.stdout.flush()  # what came before stands before
    for line in [line for line in message.split("\n") if line.strip()][:MOST_LINES]:
        say(("" if line.startswith(" ") else "error: ") + line[:LONGEST_LINE], file=sys.stderr)
    return 1 if isinstance(error, TrainingFailed) else 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are user errors like any other."""

    def error(self, message: str) -> NoReturn:
        _refuse(message)


def _refuse(message: str) -> NoReturn:
    """Raise argparse's complaint as a UserError."""
    raise UserError(f"{message} (--help lists what there is)")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option of tools that read the files which a run names."""
    parser.add_argument(
        "--trust", action="store_true", help="read the files that RUN names, though it was made elsewhere"
    )


def check_arguments(arguments: list[str], groups: Collection[str]) -> None:
    """Raises UserError where Hydra would print its whole usage, or end in a traceback.

    Args:
        groups: of the configuration, of which an option is chosen by its name
    """
    parser = get_args_parser()
    parser.error = _refuse
    parsed = parser.parse_args(arguments)
    asked = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(parsed, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} do not go together: give one of them")
    for override in OverridesParser.create().parse_overrides(parsed.overrides):
        if not override.key_or_group:
            raise UserError(f"{override.input_line}: overrides are written key=value, or group=option")
        chooses = override.key_or_group in groups and not (override.is_sweep_override() or override.is_delete())
        if chooses and not isinstance(override.value(), str | list):
            raise UserError(f"{override.input_line} is no option of {override.key_or_group}: they have names")


def quoted(value: object) -> str:
    """Quote a string for Hydra's command-line grammar, whatever characters it has."""
    return QuotedString(str(value), Quote.single).with_quotes()


def explain_hydra(error: Exception, schema: type | None = None) -> str:
    """Hydra's and OmegaConf's complaints about a command line, shortened, with the nearest valid key."""
    text, cause = str(error), error.__cause__
    if isinstance(error, MissingConfigException):
        names = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        group = re.search(r"Could not find '(.+)/(.+)'", text)
        if group and (package := PLUGINS.get(f"{group[1]}={group[2]}")):
            return f"{group[1]}={group[2]} needs a plugin that is not installed:\n  pip install {package}"
        if group:
            choices = f"one of: {', '.join(names)}" if names else "there are none"
            return f"unknown {group[1]}={group[2]}{nearest(group[2], names)}\n  {choices}"
    if isinstance(error, ConfigCompositionException) and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = re.search(r"Could not override '([^']+)'", text)
        names = key_names(schema) if schema else []
        if key and key[1] in names:  # a list of dataclasses: one of them has no such key
            own = [field.name for field in fields(cast(type, cause.object_type))]
            return f"unknown key {cause.key} in {key[1]}{nearest(cause.key, own)}"
        if key:
            return f"unknown key {key[1]}{nearest(key[1], names)}"
    if isinstance(cause, OmegaConfBaseException):
        override = re.search(r"Error merging override (.+)", text)
        key, complaint = override[1] if override else text.splitlines()[0], str(cause).splitlines()[0]
        takes = next((what for words, what in TAKES.items() if words in complaint), None)
        return f"{key}: {complaint}" if takes is None else f"{key}: {key.partition('=')[0]} takes {takes}"
    if "Ambiguous value" in text:
        return f"{text.splitlines()[0]}\n  -m runs all of them, one after another"
    if isinstance(error, OverrideParseException):
        return f"{text.splitlines()[0]}\n  overrides are written key=value, or group=option"
    return text.splitlines()[0]


def check_keys(composed: DictConfig, schema: type) -> None:
    """Raises UserError for a key that `schema` lacks, as `+key=value` can add it to the composition."""
    known = key_names(schema)
    plain: Any = OmegaConf.to_container(composed)
    for key in flatten(plain):
        if key not in known:
            raise UserError(f"unknown key {key}{nearest(key, known)}")
