"""Local disks and object stores behind one interface: opening and listing them, and their errors as one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import urllib.parse
from collections.abc import Iterator
from datetime import timedelta

import pyarrow as pa
import pyarrow.fs as pafs

from htcl_ray.errors import AccessDeniedError, HtclError, StorageError, WorkspaceError
from htcl_ray.workspace.paths import is_uri, local_path

SUPPORTED = "a local path, file://, s3:// or gs://"
OBJECT_STORES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
"""Schemes of object stores, and Arrow's name of each."""
URI_OPTIONS = re.compile(
    r"\?(?:(?:region|scheme|endpoint_override|retry_limit_seconds|project_id|anonymous)=[^&]*(?:&|$))+$"
)
"""Options of an object store at the end of a URI. Any other "?" is part of a name."""
CONNECT_SECONDS = 3.0
S3_ATTEMPTS = 5
"""Attempts per request, about 8 s in total: enough for throttling and dropped connections, not for an outage."""
GCS_RETRY_SECONDS = 10
"""Retry limit per request. Arrow's default is 15 minutes, during which an unreachable server looks like a hang."""
DENIED = re.compile(
    r"access.?denied|permission.?denied|unauthenticated|forbidden|invalid.?access.?key|signature.?does.?not.?match"
    r"|(expired|invalid).?token|(status|code):? 40[13]\b",
    re.IGNORECASE,
)
NO_SPACE = re.compile(r"no space left|disk quota exceeded|errno (28|122)\b", re.IGNORECASE)
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)
"""Error numbers of the operating system that mean a failing disk or missing rights."""


def split_options(uri: str) -> tuple[str, str]:
    """Split the URI of an object store into the location and its options with their "?"; "" when it has none."""
    match = URI_OPTIONS.search(uri)
    return (uri[: match.start()], match[0]) if match else (uri, "")


def open_filesystem(path_or_uri: str) -> tuple[pafs.FileSystem, str]:
    """Open the file system of a local path or of a file://, s3:// or gs:// URI, and return it with the path on it.

    URIs are percent-decoded. Requests to an object store are retried for some seconds before they fail. Raises
    WorkspaceError for other schemes and malformed URIs, and StorageError or AccessDeniedError when the region of a
    bucket cannot be determined.
    """
    path = local_path(path_or_uri)
    if path is not None:
        return pafs.LocalFileSystem(), path
    scheme, _, rest = path_or_uri.partition("://")
    if scheme.lower() not in OBJECT_STORES:
        raise WorkspaceError(f"'{path_or_uri}' cannot be opened: {scheme}:// is not supported; expected {SUPPORTED}")
    rest, options = split_options(rest)
    bucket, slash, name = rest.partition("/")
    quoted = urllib.parse.quote_from_bytes(urllib.parse.unquote_to_bytes(name))
    try:
        with storage_errors(path_or_uri):
            filesystem, inner = pafs.FileSystem.from_uri(
                f"{OBJECT_STORES[scheme.lower()]}://{bucket}{slash}{quoted}{options}"
            )
    except pa.ArrowInvalid as error:
        raise WorkspaceError(f"'{path_or_uri}' cannot be opened: {reason_of(error)}; expected {SUPPORTED}") from None
    return _with_time_limits(filesystem), inner


def _with_time_limits(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """Return the same object store with time limits, which a URI cannot state."""
    _, (options,) = filesystem.__reduce__()
    if isinstance(filesystem, pafs.S3FileSystem):
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
        return pafs.S3FileSystem(**{**options, "connect_timeout": CONNECT_SECONDS, "retry_strategy": retries})
    limit = options["retry_time_limit"] or timedelta(seconds=GCS_RETRY_SECONDS)
    return pafs.GcsFileSystem(**{**options, "retry_time_limit": limit})


def list_folder(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """List the entries directly in a folder; an empty list when the folder does not exist.

    pyarrow tries to open the folder and, on failure, checks that it is missing. A folder that is created between these
    two calls raises FileNotFoundError, so the listing is repeated once.
    """
    selector = pafs.FileSelector(folder, allow_not_found=True)
    try:
        return list(filesystem.get_file_info(selector))
    except FileNotFoundError:
        return list(filesystem.get_file_info(selector))


def is_storage_error(error: BaseException) -> bool:
    """Whether an error comes from the operating system or an object store, rather than from the content of a file.

    Arrow raises OSError for both.
    """
    return isinstance(error, OSError) and (
        error.errno is not None or "AWS Error" in str(error) or "google::cloud" in str(error)
    )


def explain(error: BaseException, where: str) -> AccessDeniedError | StorageError:
    """Convert a failure of an operating system or object store to an error with one sentence."""
    code, reason = getattr(error, "errno", None), reason_of(error)
    if code in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE.search(reason):
        return StorageError(
            f"no space left on the device of {where}; free some, or choose another place, "
            "and run the same command again"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS) or (code is None and DENIED.search(reason)):
        needed = (
            "these credentials must be allowed to list and read it"
            if is_uri(where)
            else "this user must be allowed to use it"
        )
        return AccessDeniedError(
            f"access denied to {where} ({reason}); {needed}, and to write it if it is the workspace"
        )
    if is_uri(where):
        return StorageError(
            f"{where} cannot be reached, also after retries ({reason}); run the same command again when it can"
        )
    return StorageError(f"{where} cannot be read or written ({reason}); run the same command again when it can")


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters, without a full stop at its end."""
    strerror = getattr(error, "strerror", None)
    text = (str(strerror or error) or type(error).__name__).splitlines()[0]
    return text.partition(" Learn more about ")[0][:300].rstrip(".")


def storage_failure(error: BaseException, where: str) -> HtclError | None:
    """Find the storage error that caused an error of any library, and explain it; None when storage is not the cause.

    `where`: the path or URI to name when the error itself does not name one.
    """
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            break
        message = str(cause)  # for the error of a Ray task, its traceback
        while isinstance(carried := getattr(cause, "cause", None), BaseException):
            cause = carried
        place = str(getattr(cause, "filename", None) or where)
        if NO_SPACE.search(f"{message}\n{cause}"):
            return explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), place)
        if is_storage_error(cause) and getattr(cause, "errno", None) in (None, *STORAGE_ERRNOS):
            return explain(cause, place)
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Convert errors of the operating system and of object stores into AccessDeniedError or StorageError.

    FileNotFoundError is passed on unchanged.
    """
    try:
        yield
    except (FileNotFoundError, AccessDeniedError, StorageError):
        raise
    except OSError as error:
        raise explain(error, where) from error
