"""Open audio files on disk, in an object store or in memory."""

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
    """Open a path, URI, bytes or file object as a seekable file at its start.

    A file object of the caller stays open. Raises AudioError for a missing, inaccessible or unsupported source, and
    AccessDeniedError or StorageError when the object store fails, also during the caller's reads.
    """
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        yield source
        return
    path = os.fspath(source)
    file, remote = _open_path(path)
    with file:
        try:
            yield file
        except Exception:  # of the caller's block, caused by the read error if one occurred
            if remote is None or remote.error is None:
                raise
        if remote is not None and remote.error is not None:
            raise explain(remote.error, path) from remote.error


def _open_path(path: str) -> tuple[IO[bytes], _RemoteFile | None]:
    """Open a path or URI; the second value is the unbuffered file of an object store."""
    try:
        on_disk = local_path(path)
        if on_disk is None:
            remote = _RemoteFile(path)
            return io.BufferedReader(remote, REMOTE_READ_BYTES), remote
        if not stat.S_ISREG(os.stat(on_disk).st_mode):  # opening a named pipe would block
            raise AudioError(Reason.AUDIO_NOT_FOUND, f"{on_disk} is not a regular file")
        return open(on_disk, "rb"), None
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


class _RemoteFile(io.RawIOBase):
    """A file of an object store that ends at the first read error and keeps it in `error`.

    Decoders would take a read error for the end of the audio.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.error: OSError | None = None
        with storage_errors(uri):
            filesystem, inner = open_filesystem(uri)
            self._file = filesystem.open_input_file(inner)
            self._size: int = self._file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._size}[whence]
        self._file.seek(min(max(start + offset, 0), self._size))
        return self.tell()

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
    """Return the first line of a library's error message, at most 200 characters."""
    text = (
        getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    )
    return str(text).splitlines()[0][:200]
