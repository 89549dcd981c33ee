"""Opening audio files: on a disk, in an object store, or in memory."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import IO, Any

from htcl_ray.errors import AccessDeniedError, AudioError, StorageError, WorkspaceError
from htcl_ray.schemas import Reason
from htcl_ray.workspace.filesystem import explain, open_filesystem, storage_errors
from htcl_ray.workspace.paths import local_path

REMOTE_READ_BYTES = 1 << 20


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | bytes | IO[bytes]) -> Iterator[IO[bytes]]:
    """The source as a seekable file at its start; the caller's own file object is left open."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        yield source
        return
    path = os.fspath(source)
    remote: _RemoteFile | None = None
    try:
        on_disk = local_path(path)
        if on_disk is None:
            remote = _RemoteFile(path)
            file: IO[bytes] = io.BufferedReader(remote, REMOTE_READ_BYTES)
        elif not stat.S_ISREG(os.stat(on_disk).st_mode):  # opening a named pipe would wait for ever
            raise AudioError(Reason.AUDIO_NOT_FOUND, f"{on_disk} is not a regular file")
        else:
            file = open(on_disk, "rb")  # noqa: SIM115
    except WorkspaceError as error:
        raise AudioError(Reason.UNSUPPORTED_URI, str(error)) from None
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError(Reason.AUDIO_NOT_FOUND, f"{path} does not exist") from None
    except PermissionError:
        raise AudioError(Reason.ACCESS_DENIED, f"access denied to {path}") from None
    except ValueError as error:
        raise AudioError(Reason.AUDIO_NOT_FOUND, f"{path} cannot be read: {one_line(error)}") from None
    except (AccessDeniedError, StorageError):
        raise
    except OSError as error:
        raise explain(error, path) from error
    with file:
        try:
            yield file
        except Exception:
            if remote is None or remote.error is None:
                raise
        if remote is not None and remote.error is not None:
            raise explain(remote.error, path) from remote.error


class _RemoteFile(io.RawIOBase):
    """A file of an object store that ends at the first read error and remembers it: decoders take errors for the end of
    the audio.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.error: OSError | None = None
        with storage_errors(uri):
            filesystem, inner = open_filesystem(uri)
            self._file = filesystem.open_input_file(inner)
            self._size = self._file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}[whence]
        self._file.seek(min(max(start + offset, 0), self._size))
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        if self.error is not None:
            return 0
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            self.error = error
            return 0
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def one_line(error: Exception) -> str:
    """What an error of any library says, in at most 200 characters."""
    text = (
        getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    )
    return str(text).splitlines()[0][:200]
