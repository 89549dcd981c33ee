"""Where artifacts live, and how they are written so that nothing half-written looks finished.

Two rules hold for every artifact of a workspace, on a local disk and on object storage alike: each file appears whole
(written beside and renamed, or one atomic upload), and `manifest.json` is written last, so a folder without a manifest
is unfinished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from htcl_ray.errors import AccessDeniedError, HtclError, MismatchError, StorageError, WorkspaceError
from htcl_ray.schemas import FORMAT_VERSION
from htcl_ray.workspace.credentials import tree_without_credentials, without_credentials
from htcl_ray.workspace.local_copies import file_sha256 as file_sha256
from htcl_ray.workspace.local_copies import private_folder, verified_copy
from htcl_ray.workspace.paths import is_uri, local_path

MANIFEST = "manifest.json"
DESCRIPTIONS = ("README.md", "evaluation.json")
"""Files of a model that say what was measured; they may change after the model was made."""
LIBRARIES = ("htcl-ray", "ray", "torch", "transformers", "pyarrow", "librosa", "faiss-cpu", "numpy")


SUPPORTED = "a local path, file://, s3:// or gs://"
OBJECT_STORES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
"""Schemes of object storage, and how Arrow calls them."""
URI_OPTIONS = re.compile(
    r"\?(?:(?:region|scheme|endpoint_override|retry_limit_seconds|project_id|anonymous)=[^&]*(?:&|$))+$"
)
"""Options of an object store behind a URI. Any other "?" belongs to a name."""
CONNECT_SECONDS = 3.0
S3_ATTEMPTS = 5
"""Of one request, about 8 s apart in sum: throttling and dropped connections pass, an outage does not."""
GCS_RETRY_SECONDS = 10
"""Of one request. Arrow's default is 15 minutes, during which an unreachable server looks like a hanging process."""


def split_options(uri: str) -> tuple[str, str]:
    """A URI of an object store without its options, and the options with their "?"; "" when there are none."""
    found = URI_OPTIONS.search(uri)
    return (uri[: found.start()], found[0]) if found else (uri, "")


def open_filesystem(path_or_uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path on it of a local path or a file://, s3:// or gs:// URI; URIs are percent-decoded.

    A request to an object store is retried for some seconds and then fails. Raises WorkspaceError for other schemes and
    malformed URIs, StorageError or AccessDeniedError when the region of a bucket cannot be found out.
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
        raise WorkspaceError(f"'{path_or_uri}' cannot be opened: {_first_line(error)}; expected {SUPPORTED}") from None
    return _with_limits(filesystem), inner


def _with_limits(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same object store with time limits, which a URI cannot state."""
    _, (options,) = filesystem.__reduce__()
    if isinstance(filesystem, pafs.S3FileSystem):
        retries = pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
        return pafs.S3FileSystem(**{**options, "connect_timeout": CONNECT_SECONDS, "retry_strategy": retries})
    limit = options["retry_time_limit"] or timedelta(seconds=GCS_RETRY_SECONDS)
    return pafs.GcsFileSystem(**{**options, "retry_time_limit": limit})


DENIED = re.compile(
    r"access.?denied|permission.?denied|unauthenticated|forbidden|invalid.?access.?key|signature.?does.?not.?match|(expired|invalid).?token"
    r"|(status|code):? 40[13]\b",
    re.IGNORECASE,
)
NO_SPACE = re.compile(r"no space left|disk quota exceeded|errno (28|122)\b", re.IGNORECASE)


def is_storage_error(error: BaseException) -> bool:
    """Whether an error is of the operating system or of an object store, and not of a file's content (Arrow raises
    OSError for both).
    """
    return isinstance(error, OSError) and (
        error.errno is not None or "AWS Error" in str(error) or "google::cloud" in str(error)
    )


def explain(error: BaseException, where: str) -> AccessDeniedError | StorageError:
    """The sentence for an operating system's or object store's error other than "not found"."""
    code, reason = getattr(error, "errno", None), _first_line(error)
    if code in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE.search(reason):
        return StorageError(
            f"no space left on the device of {where}; free some, or choose another place, and run the same command again"
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


def _first_line(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)
    text = (str(strerror or error) or type(error).__name__).splitlines()[0]
    return text.partition(" Learn more about ")[0][:300].rstrip(".")


PASSED_ON = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


def storage_failure(error: BaseException, where: str) -> HtclError | None:
    """What `explain` says of the storage error that caused an error of any library, or None when storage is not to
    blame.
    """
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            break
        said = str(cause)  # of Ray's errors of tasks, the traceback
        while isinstance(carried := getattr(cause, "cause", None), BaseException):
            cause = carried
        if NO_SPACE.search(f"{said}\n{cause}"):
            return explain(
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), str(getattr(cause, "filename", None) or where)
            )
        if is_storage_error(cause) and getattr(cause, "errno", None) in (None, *PASSED_ON):
            return explain(cause, str(getattr(cause, "filename", None) or where))
        cause = cause.__cause__ or cause.__context__
    return None


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn errors of the operating system and of object stores into AccessDeniedError or StorageError;
    FileNotFoundError stays.
    """
    try:
        yield
    except (FileNotFoundError, AccessDeniedError, StorageError):
        raise
    except OSError as error:
        raise explain(error, where) from error


def fingerprint(*parts: Any) -> str:
    """16 hex digits that are equal exactly when the JSON forms of `parts` are."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def build_manifest(
    kind: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The content of a `manifest.json`: what was made, from what, with which code, and how good it measured."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "config": tree_without_credentials(config),
        "inputs": dict(inputs),
        "quality": dict(quality or {}),
        "libraries": {name: _version(name) for name in LIBRARIES},
        **extra,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_folder(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Entries directly in a folder; none when the folder does not exist.

    pyarrow opens the folder, and on failure checks that it is missing. A folder that appears between the two is an
    error there, so the listing is repeated once.
    """
    selector = pafs.FileSelector(folder, allow_not_found=True)
    try:
        return list(filesystem.get_file_info(selector))
    except FileNotFoundError:
        return list(filesystem.get_file_info(selector))


class Workspace:
    """A workspace folder. Every path it takes or gives is relative to the root, with forward slashes.

    Cheap to pickle: it holds only its URI until it is used.
    """

    def __init__(self, uri: str) -> None:
        self.location = local_path(uri) or uri
        """Path or URI with its credentials, for what opens it."""
        self.uri = without_credentials(self.location)
        """The same for people, manifests and logs."""
        self.fs, self.root = open_filesystem(self.location)

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return type(self), (self.location,)

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def full(self, path: str) -> str:
        """Path on the file system `self.fs`."""
        return f"{self.root}/{path}" if path else self.root

    def uri_of(self, path: str) -> str:
        """Path or URI for people, manifests and logs."""
        return self._below(self.uri, path)

    def location_of(self, path: str) -> str:
        """Path or URI for what opens it, such as another library."""
        return self._below(self.location, path)

    def _below(self, root: str, path: str) -> str:
        folder, options = (root, "") if self.is_local else split_options(root)
        return f"{folder.rstrip('/')}/{path}{options}"

    def check_writable(self) -> None:
        """Raise WorkspaceError unless a file can be written here."""
        probe = self.full(f".probe-{uuid.uuid4().hex}")
        try:
            self.fs.create_dir(self.root, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"x")
            self.fs.delete_file(probe)
        except OSError as error:
            found = explain(error, self.uri)
            if self.is_local and not NO_SPACE.search(str(found)):
                reason = os.strerror(error.errno) if error.errno else _first_line(error)
                raise WorkspaceError(
                    f"the workspace {self.uri} cannot be written ({reason}); choose another with --workspace"
                ) from None
            raise found from None

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder."""
        with storage_errors(self.uri_of(path)):
            return self.fs.get_file_info(self.full(path)).type != pafs.FileType.NotFound

    def children(self, path: str) -> list[str]:
        """Names directly below a folder, sorted; empty when there is no such folder. Temporary names are left out."""
        with storage_errors(self.uri_of(path)):
            infos = list_folder(self.fs, self.full(path))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def write_bytes(self, path: str, data: bytes, *, durable: bool = False) -> None:
        """Write one file atomically. `durable`: it is there after a power cut too (object storage always promises
        that).
        """
        with storage_errors(self.uri_of(path)):
            self._write_bytes(self.full(path), data, durable)

    def _write_bytes(self, target: str, data: bytes, durable: bool) -> None:
        self.fs.create_dir(os.path.dirname(target), recursive=True)
        if not self.is_local:
            with self.fs.open_output_stream(target) as stream:  # visible only when closed
                stream.write(data)
            return
        beside = f"{os.path.dirname(target)}/.{os.path.basename(target)}-{uuid.uuid4().hex[:8]}"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            Path(beside).unlink(missing_ok=True)
        if durable:
            folder = Path(target).parent
            for changed in (folder, folder.parent):  # the file's name, and the folder's, which may be new
                _sync_folder(changed)

    def read_bytes(self, path: str) -> bytes:
        """The whole of one file. Raises WorkspaceError when it is missing."""
        try:
            with storage_errors(self.uri_of(path)), self.fs.open_input_stream(self.full(path)) as stream:
                return stream.read()
        except FileNotFoundError:
            raise WorkspaceError(f"{self.uri_of(path)} does not exist") from None

    def write_json(self, path: str, value: Any) -> None:
        """Write one JSON file atomically."""
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())

    def read_json(self, path: str) -> Any:
        """Read one JSON file. Raises WorkspaceError when it is missing or is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError:
            raise WorkspaceError(
                f"{self.uri_of(path)} is not JSON; it was changed or damaged, so make it again"
            ) from None

    def write_table(self, path: str, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write one Parquet file atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=row_group_size, compression="zstd")
        self.write_bytes(path, sink.getvalue().to_pybytes())

    def read_tables(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """All Parquet files directly below a folder, in name order, as one table."""
        files = [self.full(f"{path}/{name}") for name in self.children(path) if name.endswith(".parquet")]
        if not files:
            raise WorkspaceError(f"{self.uri_of(path)} holds no Parquet file")
        with storage_errors(self.uri_of(path)):
            return pads.dataset(files, filesystem=self.fs, format="parquet").to_table(columns=columns)

    def manifest(self, path: str) -> dict[str, Any] | None:
        """The manifest of an artifact, or None when it is missing or unfinished. Raises MismatchError for another
        format.
        """
        if not self.exists(f"{path}/{MANIFEST}"):
            return None
        manifest = self.read_json(f"{path}/{MANIFEST}")
        check_format(manifest, self.uri_of(path))
        return manifest

    def finish(self, path: str, manifest: Mapping[str, Any]) -> None:
        """Mark an artifact as finished: its manifest is the last file written.

        The `created` of a new artifact is later than that of every artifact in the same folder, whatever the machines'
        clocks say, so that the newest artifact is the one that was finished last. A manifest that is written again
        keeps its own.
        """
        if "created" in manifest:
            others = {name: manifest["created"] for name, manifest in self.dated(os.path.dirname(path))}
            if (
                others.pop(os.path.basename(path), None) != manifest["created"]
                and max(others.values(), default="") >= manifest["created"]
            ):
                later = datetime.fromisoformat(max(others.values())) + timedelta(microseconds=1)
                manifest = {**manifest, "created": later.isoformat(timespec="microseconds")}
        self.write_json(f"{path}/{MANIFEST}", manifest)

    def dated(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and manifests of the artifacts directly below a folder that say when they were made, of whatever
        format.
        """
        for name in self.children(path) if path else ():
            with contextlib.suppress(WorkspaceError, ValueError, TypeError, KeyError):
                manifest = self.read_json(f"{path}/{name}/{MANIFEST}")
                if datetime.fromisoformat(manifest["created"]).tzinfo is not None:
                    yield name, manifest

    def finished(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """Finished artifacts directly below a folder, oldest first, as (name, manifest)."""
        found = [(name, self.manifest(f"{path}/{name}")) for name in self.children(path)]
        return sorted(((name, m) for name, m in found if m is not None), key=lambda item: item[1]["created"])

    def remove(self, path: str) -> None:
        """Remove a folder and all below it, the manifest first, so that an interrupted removal looks unfinished."""
        with storage_errors(self.uri_of(path)):
            if self.exists(f"{path}/{MANIFEST}"):
                self.fs.delete_file(self.full(f"{path}/{MANIFEST}"))
            if self.exists(path):
                self.fs.delete_dir(self.full(path))

    def publish(self, folder: Path, path: str, manifest: Mapping[str, Any]) -> None:
        """Move a finished local folder into the workspace as an artifact, manifest last; an older artifact there is
        replaced.
        """
        self.remove(path)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
            target = self.full(f"{path}/{file.relative_to(folder).as_posix()}")
            with storage_errors(self.uri_of(path)):
                self.fs.create_dir(os.path.dirname(target), recursive=True)
                pafs.copy_files(
                    str(file), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.fs
                )
        self.finish(path, manifest)

    def local_copy(self, path: str) -> Path:
        """A folder of this machine with the artifact's content: the artifact itself, or a copy that is verified by hash
        and made once.

        Raises WorkspaceError when there is no such artifact, and MismatchError when its files are not those of its
        manifest.
        """
        if self.is_local:
            return Path(self.full(path))
        manifest = self.manifest(path)
        if manifest is None:
            raise WorkspaceError(f"{self.uri_of(path)} does not exist or is unfinished")
        expected = {name: sha256 for name, sha256 in manifest.get("files", {}).items() if name not in DESCRIPTIONS}
        with storage_errors(f"{self.uri_of(path)} or its copy in {tempfile.gettempdir()}"):
            target = private_folder() / fingerprint(self.uri, path, manifest)
            return verified_copy(
                target, lambda folder: self._download(path, folder, manifest), expected, self.uri_of(path)
            )

    def _download(self, path: str, folder: Path, manifest: Mapping[str, Any]) -> None:
        pafs.copy_files(
            self.full(path), str(folder), source_filesystem=self.fs, destination_filesystem=pafs.LocalFileSystem()
        )
        if Workspace(str(folder)).manifest("") != manifest:
            raise MismatchError(f"{self.uri_of(path)} changed while it was copied; try again")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_format(manifest: Mapping[str, Any], where: str) -> None:
    """Raise MismatchError unless a manifest was written in the format that this code reads."""
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        todo = "install a newer one" if newer else "make it again, or choose another workspace"
        raise MismatchError(f"{where} has format version {version}, but this htcl-ray reads {FORMAT_VERSION}; {todo}")
