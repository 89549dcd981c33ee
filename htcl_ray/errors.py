"""Every error that this package raises on purpose.

    HtclError                 anything below; exit code 1
    ├── InputError            the user's input or configuration is wrong; exit code 2, one sentence, no traceback
    │   ├── ConfigError       an unknown key, a value out of range, keys that contradict each other
    │   ├── TableError        a catalogue or log table that cannot be used at all
    │   ├── WorkspaceError    a workspace that cannot be read or written, or an artifact missing from it
    │   ├── LeakageError      what is evaluated was seen in training
    │   ├── MismatchError     two artifacts that do not fit each other; the message names both values
    │   ├── GateError         a model or index that an evaluation's gate did not let through
    │   ├── IndexRefusedError an index that cannot be switched to
    │   │   └── IndexNotFoundError an index that the workspace does not hold
    │   ├── QueryError        a search that cannot be answered: an option out of range, a vector of another width
    │   │   └── SongNotFoundError a song that the index does not hold
    │   ├── ArgumentError     an argument of the Python client that cannot be sent
    │   └── AudioError        one audio file or upload that cannot be used; carries a `reason`
    ├── StepError             a step that started and could not finish
    ├── RequestError          a request of the client that the server refused; carries status, code and message
    └── NoAnswerError         a request of the client that no server answered

Messages are one sentence for a person: what is wrong and where, what was expected, what to do.
"""

from __future__ import annotations

from htcl_ray.schemas import Reason
from htcl_ray.workspace.credentials import without_credentials


class HtclError(Exception):
    """Root of all errors raised on purpose. Its message holds no credentials of a URI, whatever it was made from."""

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
    """What is evaluated was seen in training."""


class GateError(InputError):
    """A model or index failed its gate, and nobody said to use it all the same."""


class IndexRefusedError(InputError):
    """An index cannot be switched to: its name is none, it is damaged, of other models, or its gate failed."""


class IndexNotFoundError(IndexRefusedError):
    """The workspace does not hold this index."""


class QueryError(InputError):
    """A search cannot be answered as it was asked."""


class SongNotFoundError(QueryError):
    """The index does not hold this song."""


class AudioNotFoundError(QueryError):
    """The index holds the song, but there is no sound of it to play."""


class ArgumentError(InputError):
    """An argument of the Python client, of its constructor or of a call, cannot be used; the message names it."""


class AudioError(InputError):
    """One audio file cannot be used; `reason` says why in the quarantine table's vocabulary."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = str(self)

    def __reduce__(self) -> tuple[type[AudioError], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


class AccessDeniedError(InputError, OSError):
    """A file, folder or bucket may not be read or written with this process's rights or credentials."""


class StepError(HtclError):
    """A step started and could not finish."""


class StorageError(StepError, OSError):
    """Storage failed: no space left, not reachable, or an error of the device. The input is not to blame."""


class RequestError(HtclError):
    """The server refused a request.

    `status`: of HTTP; `code`: for programs, stable; `message`: for people; `retry_after`: seconds to wait, where the
    server said so.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} ({status} {code})")
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[RequestError], tuple[int, str, str, float | None]]:
        return type(self), (self.status, self.code, self.message, self.retry_after)


class NoAnswerError(HtclError):
    """No server answered a request: it cannot be reached, broke off, or took too long."""
