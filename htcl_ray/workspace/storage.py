"""The workspace of a run: where artifacts are stored, and atomic writes, so that no partial artifact looks finished.

Two rules hold for every artifact, on a local disk and on object storage alike: each file appears complete (a temporary
file that is renamed, or one atomic upload), and `manifest.json` is written last, so a folder without a manifest is
unfinished.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.filesystem import (
    NO_SPACE,
    explain,
    list_folder,
    open_filesystem,
    reason_of,
    split_options,
    storage_errors,
)
from htcl_ray.workspace.local_copies import private_folder, verified_copy, write_atomically
from htcl_ray.workspace.manifest import DESCRIPTIONS, MANIFEST, check_format, fingerprint
from htcl_ray.workspace.paths import local_path


class Workspace:
    """A workspace folder. All paths in its methods are relative to its root, with forward slashes.

    Only its URI is pickled.
    """

    def __init__(self, uri: str) -> None:
        self.location = local_path(uri) or uri
        """Path or URI with its credentials, to open it with."""
        self.uri = without_credentials(self.location)
        """Path or URI without credentials, for messages, manifests and logs."""
        self.fs, self.root = open_filesystem(self.location)

    def __reduce__(self) -> tuple[type[Workspace], tuple[str]]:
        return type(self), (self.location,)

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def full(self, path: str) -> str:
        """The path on the file system `self.fs`."""
        return f"{self.root}/{path}" if path else self.root

    def uri_of(self, path: str) -> str:
        """The path or URI without credentials, for messages, manifests and logs."""
        return self._below(self.uri, path)

    def location_of(self, path: str) -> str:
        """The path or URI with its credentials, for a library that opens it."""
        return self._below(self.location, path)

    def _below(self, root: str, path: str) -> str:
        folder, options = (root, "") if self.is_local else split_options(root)
        return f"{folder.rstrip('/')}/{path}{options}"

    def check_writable(self) -> None:
        """Raise WorkspaceError, StorageError or AccessDeniedError unless a file can be written."""
        probe = self.full(f".probe-{uuid.uuid4().hex}")
        try:
            self.fs.create_dir(self.root, recursive=True)
            with self.fs.open_output_stream(probe) as stream:
                stream.write(b"x")
            self.fs.delete_file(probe)
        except OSError as error:
            failure = explain(error, self.uri)
            if self.is_local and not NO_SPACE.search(str(failure)):
                reason = os.strerror(error.errno) if error.errno else reason_of(error)
                raise WorkspaceError(
                    f"the workspace {self.uri} cannot be written ({reason}); choose another with --workspace"
                ) from None
            raise failure from None

    def exists(self, path: str) -> bool:
        """Whether a file or folder exists."""
        with storage_errors(self.uri_of(path)):
            return bool(self.fs.get_file_info(self.full(path)).type != pafs.FileType.NotFound)

    def children(self, path: str) -> list[str]:
        """The names directly below a folder, sorted, without temporary names; empty when the folder does not exist."""
        with storage_errors(self.uri_of(path)):
            infos = list_folder(self.fs, self.full(path))
        return sorted(info.base_name for info in infos if not info.base_name.startswith("."))

    def write_bytes(self, path: str, data: bytes, *, durable: bool = False) -> None:
        """Write one file atomically. `durable`: it survives a power cut, as every file of an object store does."""
        target = self.full(path)
        with storage_errors(self.uri_of(path)):
            self.fs.create_dir(os.path.dirname(target), recursive=True)
            if self.is_local:
                write_atomically(Path(target), data, durable=durable)
            else:
                with self.fs.open_output_stream(target) as stream:  # visible only when it is closed
                    stream.write(data)

    def read_bytes(self, path: str) -> bytes:
        """Read one file. Raises WorkspaceError when it is missing."""
        try:
            with storage_errors(self.uri_of(path)), self.fs.open_input_stream(self.full(path)) as stream:
                return bytes(stream.read())
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
        """Read all Parquet files directly below a folder, in the order of their names, as one table."""
        files = [self.full(f"{path}/{name}") for name in self.children(path) if name.endswith(".parquet")]
        if not files:
            raise WorkspaceError(f"{self.uri_of(path)} holds no Parquet file")
        with storage_errors(self.uri_of(path)):
            return pads.dataset(files, filesystem=self.fs, format="parquet").to_table(columns=columns)

    def manifest(self, path: str) -> dict[str, Any] | None:
        """The manifest of an artifact, or None when the artifact is missing or unfinished.

        Raises MismatchError when its format version is another one.
        """
        if not self.exists(f"{path}/{MANIFEST}"):
            return None
        manifest: dict[str, Any] = self.read_json(f"{path}/{MANIFEST}")
        check_format(manifest, self.uri_of(path))
        return manifest

    def finish(self, path: str, manifest: Mapping[str, Any]) -> None:
        """Mark an artifact as finished by writing its manifest, which is the last file to be written.

        `created` of a new artifact is made later than that of every artifact in the same folder, so that the newest
        artifact is the one that finished last even where the clocks of machines differ. A manifest that is rewritten
        keeps its `created`.
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
        """Iterate over (name, manifest) of the artifacts directly below a folder, of any format version.

        Artifacts whose manifest has no valid `created` are skipped.
        """
        for name in self.children(path) if path else ():
            with contextlib.suppress(WorkspaceError, ValueError, TypeError, KeyError):
                manifest = self.read_json(f"{path}/{name}/{MANIFEST}")
                if datetime.fromisoformat(manifest["created"]).tzinfo is not None:
                    yield name, manifest

    def finished(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """The finished artifacts directly below a folder as (name, manifest), oldest first."""
        artifacts = [(name, self.manifest(f"{path}/{name}")) for name in self.children(path)]
        return sorted(((name, m) for name, m in artifacts if m is not None), key=lambda item: item[1]["created"])

    def remove(self, path: str) -> None:
        """Remove a folder, its manifest first, so that after an interrupted removal the artifact is unfinished."""
        with storage_errors(self.uri_of(path)):
            if self.exists(f"{path}/{MANIFEST}"):
                self.fs.delete_file(self.full(f"{path}/{MANIFEST}"))
            if self.exists(path):
                self.fs.delete_dir(self.full(path))

    def publish(self, folder: Path, path: str, manifest: Mapping[str, Any]) -> None:
        """Copy a local folder into the workspace as an artifact, its manifest last, replacing an earlier artifact."""
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
        """Return a local folder with the artifact's content.

        In a local workspace it is the artifact itself, and otherwise a copy that is downloaded once and verified by
        hash. Raises WorkspaceError when the artifact does not exist, and MismatchError when its files differ from the
        hashes in its manifest.
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
