"""Where artifacts live, and how they are written so that nothing half-written looks finished.

Two rules hold for every artifact of a workspace, on a local disk and on object storage alike: each file appears whole (written beside
and renamed, or one atomic upload), and `manifest.json` is written last, so a folder without a manifest is unfinished.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.schemas import FORMAT_VERSION

MANIFEST = "manifest.json"
LIBRARIES = ("htcl-ray", "ray", "torch", "transformers", "pyarrow", "librosa", "faiss-cpu", "numpy")


_LITERAL_IN_URI = "%/:?@!$&'()*+,;=~[]"
"""People write names with spaces, accents and "#" into URIs; what is no part of a URI's syntax is escaped for them."""


def open_filesystem(path_or_uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and path on it of a local path or an s3://, gs:// or file:// URI. Raises WorkspaceError."""
    if "://" not in path_or_uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path_or_uri))
    try:
        return pafs.FileSystem.from_uri(urllib.parse.quote(path_or_uri, safe=_LITERAL_IN_URI))
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise WorkspaceError(f"'{path_or_uri}' cannot be opened: {reason}; expected a local path, s3:// or gs://") from None


def fingerprint(*parts: Any) -> str:
    """16 hex digits that are equal exactly when the JSON forms of `parts` are."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a local file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_manifest(
    kind: str, *, config: Mapping[str, Any], inputs: Mapping[str, Any], quality: Mapping[str, Any] | None = None, **extra: Any
) -> dict[str, Any]:
    """The content of a `manifest.json`: what was made, from what, with which code, and how good it measured."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "config": dict(config),
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


class Workspace:
    """A workspace folder. Every path it takes or gives is relative to the root, with forward slashes.

    Cheap to pickle: it holds only its URI until it is used.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))
        self.fs, self.root = open_filesystem(self.uri)

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return type(self), (self.uri,)

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def full(self, path: str) -> str:
        """Path on the file system `self.fs`."""
        return f"{self.root}/{path}" if path else self.root

    def uri_of(self, path: str) -> str:
        """Path or URI as a person or another library would write it."""
        return f"{self.uri.rstrip('/')}/{path}"

    def check_writable(self) -> None:
        """Raise WorkspaceError unless a file can be written here."""
        probe = self.full(f".probe-{uuid.uuid4().hex}")
        try:
            self.fs.create_dir(self.root, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"x")
            self.fs.delete_file(probe)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
            raise WorkspaceError(f"the workspace {self.uri} cannot be written ({reason}); choose another with --workspace") from None

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder."""
        return self.fs.get_file_info(self.full(path)).type != pafs.FileType.NotFound

    def children(self, path: str) -> list[str]:
        """Names directly below a folder, sorted; empty when there is no such folder. Temporary names are left out."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.full(path), allow_not_found=True))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def write_bytes(self, path: str, data: bytes, *, durable: bool = False) -> None:
        """Write one file atomically. `durable`: it is there after a power cut too (object storage always promises that)."""
        target = self.full(path)
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
            with self.fs.open_input_stream(self.full(path)) as stream:
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
            raise WorkspaceError(f"{self.uri_of(path)} is not JSON; it was changed or damaged, so make it again") from None

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
        return pads.dataset(files, filesystem=self.fs, format="parquet").to_table(columns=columns)

    def manifest(self, path: str) -> dict[str, Any] | None:
        """The manifest of an artifact, or None when it is missing or unfinished. Raises MismatchError for a newer format."""
        if not self.exists(f"{path}/{MANIFEST}"):
            return None
        manifest = self.read_json(f"{path}/{MANIFEST}")
        check_format(manifest, self.uri_of(path))
        return manifest

    def finish(self, path: str, manifest: Mapping[str, Any]) -> None:
        """Mark an artifact as finished: its manifest is the last file written."""
        self.write_json(f"{path}/{MANIFEST}", manifest)

    def finished(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """Finished artifacts directly below a folder, oldest first, as (name, manifest)."""
        found = [(name, self.manifest(f"{path}/{name}")) for name in self.children(path)]
        return sorted(((name, m) for name, m in found if m is not None), key=lambda item: item[1]["created"])

    def remove(self, path: str) -> None:
        """Remove a folder and all below it, the manifest first, so that an interrupted removal looks unfinished."""
        if self.exists(f"{path}/{MANIFEST}"):
            self.fs.delete_file(self.full(f"{path}/{MANIFEST}"))
        if self.exists(path):
            self.fs.delete_dir(self.full(path))

    def publish(self, folder: Path, path: str, manifest: Mapping[str, Any]) -> None:
        """Move a finished local folder into the workspace as an artifact, manifest last; an older artifact there is replaced."""
        self.remove(path)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
            target = self.full(f"{path}/{file.relative_to(folder).as_posix()}")
            self.fs.create_dir(os.path.dirname(target), recursive=True)
            pafs.copy_files(str(file), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.fs)
        self.finish(path, manifest)

    def local_copy(self, path: str) -> Path:
        """A folder of this machine with the artifact's content: the artifact itself, or a download that is made once."""
        if self.is_local:
            return Path(self.full(path))
        manifest = self.manifest(path)
        if manifest is None:
            raise WorkspaceError(f"{self.uri_of(path)} does not exist or is unfinished")
        target = Path(tempfile.gettempdir()) / f"htcl-{os.getuid()}" / fingerprint(self.uri, path, manifest)
        if not target.exists():
            beside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
            beside.mkdir(parents=True)
            pafs.copy_files(self.full(path), str(beside), source_filesystem=self.fs, destination_filesystem=pafs.LocalFileSystem())
            try:
                beside.rename(target)
            except OSError:  # another process was faster
                shutil.rmtree(beside)
        return target


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_format(manifest: Mapping[str, Any], where: str) -> None:
    """Raise MismatchError when a manifest was written by a newer format than this code reads."""
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise MismatchError(f"{where} has format version {version}, but this htcl-ray reads up to {FORMAT_VERSION}; install a newer one")
