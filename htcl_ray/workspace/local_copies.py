"""Local files that the processes of one user share: atomic writes, a private folder, locks and verified copies.

The system's directory for temporary files is writable by every local user, so a file name in it proves nothing. Files
in `private_folder` were written by this user: it is a real directory, owned by this user, and not writable by others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from htcl_ray.errors import MismatchError
from htcl_ray.workspace.manifest import file_sha256

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OWNER_ONLY = stat.S_IRWXU

log = logging.getLogger(__name__)


def write_atomically(target: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file of an existing folder under a temporary name and rename it, so that no reader sees part of it.

    `durable`: flush the file and its folders to the disk, so that it survives a power cut.
    """
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        for folder in (target.parent, target.parent.parent):  # the file's name, and the folder's, which may be new
            _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_name() -> str:
    """The name of this user's private folder."""
    return f"htcl-{os.geteuid()}"


def private_folder(parent: str | Path | None = None) -> Path:
    """Return this user's private folder (mode 0700) below `parent`, by default the directory for temporary files.

    It is created when it does not exist. When its name is taken by another user, by a link, or by a folder that others
    may write, a folder with a random suffix is used instead, the same one in all later processes of this user. `parent`
    must have the sticky bit if others may write to it.
    """
    parent = Path(parent or tempfile.gettempdir())
    expected = parent / private_name()
    with contextlib.suppress(FileExistsError):
        expected.mkdir(mode=OWNER_ONLY, parents=True)
    if _is_private(expected):
        return expected
    for other in sorted(parent.glob(f"{expected.name}-*")):
        if _is_private(other):
            return other
    made = Path(tempfile.mkdtemp(prefix=f"{expected.name}-", dir=parent))
    log.warning(
        "%s is not a folder that only this user may write, so %s is used instead; remove the former", expected, made
    )
    return made


def _is_private(folder: Path) -> bool:
    """Whether a folder is a directory of this user that others may not write to; read access of others is removed."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
        return False
    if stat.S_IMODE(status.st_mode) != OWNER_ONLY:
        folder.chmod(OWNER_ONLY)
    return True


def lock_folder(folder: Path, operation: int) -> int | None:
    """Lock `folder` and return the descriptor that holds the lock, until it is closed or the process ends.

    `operation`: one of fcntl's, such as LOCK_EX. Returns None when it includes LOCK_NB and another process holds the
    lock. A process that removes the folder may remove the lock file with it, and a lock on a removed file excludes no
    other process; the lock is then taken again on a new file.
    """
    file = folder.with_suffix(".lock")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, operation)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = lock_folder(folder, fcntl.LOCK_EX)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def verified_copy(target: Path, download: Callable[[Path], None], expected: Mapping[str, str], source: str) -> Path:
    """Fill the folder `target` by `download` unless it holds an unchanged earlier download, and return it.

    `expected`: SHA-256 by file name, for the files whose hash `source` states. The hash of every file is recorded next
    to the folder, and a file is hashed again only when its size, times or inode differ from the record, so a check
    costs one `stat` per file. Concurrent processes wait for one download. Raises MismatchError when a downloaded file
    does not have its expected hash.
    """
    record = target.with_suffix(".json")
    with _locked(target):
        if not _is_unchanged(target, record):
            _copy(target, record, download, expected, source)
    return target


def identity(file: Path) -> list[int]:
    """Inode, size and times of a file: numbers that change whenever the file is written or replaced."""
    status = file.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _copy(
    target: Path, record: Path, download: Callable[[Path], None], expected: Mapping[str, str], source: str
) -> None:
    for leftover in target.parent.glob(f".{target.name}-*"):  # of a process that was killed while it held the lock
        shutil.rmtree(leftover)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(mode=OWNER_ONLY)
    try:
        download(temporary)
        made = {name: [file_sha256(temporary / name), identity(temporary / name)] for name in _files(temporary)}
        for name, sha256 in expected.items():
            if name not in made or made[name][0] != sha256:
                actual = f"has SHA-256 {made[name][0]}" if name in made else "is missing"
                raise MismatchError(
                    f"{source}/{name} {actual}, but the manifest says {sha256}; "
                    "copy the artifact again, or make it again"
                )
        if target.exists():
            target.rename(target.with_name(f".{target.name}-old"))
        _write_record(record, made)
        temporary.rename(target)
    finally:
        for leftover in target.parent.glob(f".{target.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_record(record: Path, made: Mapping[str, Any]) -> None:
    write_atomically(record, json.dumps(made).encode())


def _is_unchanged(target: Path, record: Path) -> bool:
    """Whether a copy holds exactly the files of its record, with their hashes."""
    if not target.is_dir():
        return False
    try:
        made: dict[str, Any] = json.loads(record.read_text())
        present = {name: identity(target / name) for name in _files(target)}
        touched = [name for name in made if present.get(name) != made[name][1]]
        same = present.keys() == made.keys() and all(_has_sha256(target / name, made[name][0]) for name in touched)
        if same and touched:
            _write_record(record, {name: [sha256, present[name]] for name, (sha256, _) in made.items()})
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        same = False
    if not same:
        log.warning("the copy %s was changed since it was made, so it is made again", target)
    return same


def _has_sha256(file: Path, sha256: str) -> bool:
    return stat.S_ISREG(file.lstat().st_mode) and file_sha256(file) == sha256


def _files(folder: Path) -> list[str]:
    """The relative paths of everything below a folder but real directories, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
