"""Errors that this package raises intentionally, and the first fault of a pydantic validation as a sentence.

    HtclError                 any error below; exit code 1
    ├── InputError            the user's input or configuration is wrong; exit code 2, one sentence, no traceback
    │   ├── ConfigError       an unknown key, a value out of range, keys that contradict each other
    │   ├── TableError        a catalogue or log table that cannot be used at all
    │   ├── WorkspaceError    a workspace that cannot be read or written, or an artifact missing from it
    │   ├── LeakageError      songs or events of the test set were used in training
    │   ├── MismatchError     two artifacts that do not fit each other; the message names both values
    │   ├── GateError         a model or index that failed the gate of an evaluation
    │   ├── IndexRefusedError an index that cannot be activated
    │   │   └── IndexNotFoundError an index that the workspace does not hold
    │   ├── QueryError        an invalid query: an option out of range, a vector of another width
    │   │   ├── SongNotFoundError a song that the index does not hold
    │   │   └── AudioNotFoundError a song whose audio cannot be played
    │   ├── ArgumentError     an argument of the Python client that cannot be sent
    │   ├── AudioError        one audio file or upload that cannot be used; carries a `reason`
    │   └── AccessDeniedError a file, folder or bucket that may not be read or written
    ├── StepError             a step that started and could not finish
    │   └── StorageError      a disk or object store that failed
    ├── RequestError          a request of the client that the server refused; carries status, code and message
    └── NoResponseError       a request of the client that received no response

Each message is one sentence: what is wrong and where, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from htcl_ray.schemas import Reason
from htcl_ray.workspace.credentials import without_credentials


class HtclError(Exception):
    """Base of all errors that are raised intentionally. Credentials of URIs are removed from its message."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_credentials(part) if isinstance(part, str) else part for part in args))


class InputError(HtclError):
    """The user's input or configuration is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class TableError(InputError):
    """A catalogue or log table cannot be used."""


class WorkspaceError(InputError):
    """The workspace cannot be used, or lacks an artifact that the step needs."""


class MismatchError(InputError):
    """Two artifacts do not fit each other."""


class LeakageError(InputError):
    """Songs or events of the test set were used in training."""


class GateError(InputError):
    """A model or index failed its gate, or has not been judged, and the configuration does not allow its use."""


class IndexRefusedError(InputError):
    """An index cannot be activated: its name is invalid, it is damaged, of other models, or its gate failed."""


class IndexNotFoundError(IndexRefusedError):
    """The workspace does not hold this index."""


class QueryError(InputError):
    """A query is invalid."""


class SongNotFoundError(QueryError):
    """The index does not hold this song."""


class AudioNotFoundError(QueryError):
    """The index holds the song, but its audio file cannot be played."""


class ArgumentError(InputError):
    """An argument of the Python client's constructor or of a call is invalid; the message names it."""


class AudioError(InputError):
    """One audio file cannot be used. `reason`: the value of the quarantine table's `reason` column."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = str(self)

    def __reduce__(self) -> tuple[type[AudioError], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


class AccessDeniedError(InputError, OSError):
    """The process's rights or credentials do not allow reading or writing a file, folder or bucket."""


class StepError(HtclError):
    """A step started and could not finish."""


class StorageError(StepError, OSError):
    """Storage failed: no space left, unreachable, or a device error. The user's input is not the cause."""


class RequestError(HtclError):
    """The server refused a request.

    `status`: the HTTP status; `code`: a stable identifier for programs; `message`: one sentence for people;
    `retry_after`: seconds to wait before another attempt, None unless the server named them.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} ({status} {code})")
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[RequestError], tuple[int, str, str, float | None]]:
        return type(self), (self.status, self.code, self.message, self.retry_after)


class NoResponseError(HtclError):
    """A request received no response: the server cannot be reached, closed the connection, or took too long."""


class _Validation(Protocol):
    """The part of pydantic's ValidationError and FastAPI's RequestValidationError that `first_fault` reads."""

    def errors(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Fault:
    """One fault of a pydantic validation."""

    path: tuple[str, ...]
    """The keys and positions that lead to the invalid value; empty when the fault is of the whole value."""
    message: str
    """What is wrong with the value, as a sentence without its key."""
    kind: str
    """pydantic's identifier of the error, such as `extra_forbidden`."""
    value: Any
    """The invalid value."""

    @property
    def key(self) -> str:
        """The path with dots; empty when the fault is of the whole value."""
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.path else self.message


def first_fault(error: _Validation) -> Fault:
    """The first fault of a pydantic ValidationError or a FastAPI RequestValidationError."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    return Fault(tuple(map(str, first["loc"])), message, first["type"], first.get("input"))
