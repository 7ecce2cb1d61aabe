"""Output that cannot end a run: what nobody reads any more is dropped."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Unbreakable:
    """A text stream that swallows what cannot be written, after a closed pipe or terminal, or on a full disk."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *arguments: str) -> Any:
        try:
            return call(*arguments)
        except UnicodeEncodeError:  # a terminal that does not know the sign
            encoding = self._stream.encoding
            return call(*(text.encode(encoding, "backslashreplace").decode(encoding) for text in arguments))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._stream = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            if self._name != "standard error":
                reason = getattr(error, "strerror", None) or error
                print(f"warning: {self._name} cannot be written ({reason}): the run goes on", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """Within, neither standard output nor standard error raises an error."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbreakable(out, "standard output"), Unbreakable(err, "standard error")
    try:
        yield
    finally:
        for stream, original in ((sys.stdout, out), (sys.stderr, err)):
            stream.flush()
            if stream._stream is not original:  # what is left in its buffer would fail again as the process ends
                _drain(original)
        sys.stdout, sys.stderr = out, err


def _drain(stream: TextIO) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
