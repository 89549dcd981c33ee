"""Files of this machine that processes of one user share: a private folder, locks, and verified copies of artifacts of
object storage.

The system's directory for temporary files is open to every local user, so a name in it proves nothing. What is found in
`private_folder` was written by this user: the folder is a real directory, owned by this user, into which no other may
write.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OWNER_ONLY = stat.S_IRWXU

log = logging.getLogger(__name__)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a local file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def private_name() -> str:
    """Name of this user's private folder."""
    return f"htcl-{os.geteuid()}"


def private_folder(parent: str | Path | None = None) -> Path:
    """The folder of mode 0700 that is private to this user, below `parent` (default: the directory for temporary
    files).

    It is made when it does not exist. Where its name is taken by another user, by a link, or by a folder that others
    may write, a folder with a random suffix is used instead, the same one by all later processes of this user. `parent`
    must have the sticky bit if others may write it.
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
    """Whether a folder is a directory of this user that no other may write. One that others may read is closed to
    them.
    """
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
    """A descriptor that holds the lock of `folder`, or None when `operation` does not wait and another process holds
    it.

    Whoever removes the folder may remove the lock's file with it, so a lock on a file that is gone is worth nothing and
    another one is taken. The lock ends when the descriptor is closed, or with the process.
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
    """`target`, a folder that `download` fills once; later calls of any process find it, and fill it again when it was
    changed.

    `expected`: file name → SHA-256, of the files of which `source` states one. The SHA-256 of every file is recorded
    beside the folder; a file is hashed again only when its size, times or inode are not those of the record, so that a
    check costs one `stat` a file. Processes that ask at the same time wait for one download. Raises MismatchError when
    the download is not what `expected` says.
    """
    record = target.with_suffix(".json")
    with _locked(target):
        if not _is_unchanged(target, record):
            _copy(target, record, download, expected, source)
    return target


def identity(file: Path) -> list[int]:
    """Numbers that change whenever a file's content is written or the file is replaced."""
    status = file.lstat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _copy(
    target: Path, record: Path, download: Callable[[Path], None], expected: Mapping[str, str], source: str
) -> None:
    for left in target.parent.glob(f".{target.name}-*"):  # of a process that was killed while it held the lock
        shutil.rmtree(left)
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    beside.mkdir(mode=OWNER_ONLY)
    try:
        download(beside)
        made = {name: [file_sha256(beside / name), identity(beside / name)] for name in _files(beside)}
        for name, sha256 in expected.items():
            if name not in made or made[name][0] != sha256:
                found = f"has SHA-256 {made[name][0]}" if name in made else "is missing"
                raise MismatchError(
                    f"{source}/{name} {found}, but the manifest says {sha256}; copy the artifact again, or make it again"
                )
        if target.exists():
            target.rename(target.with_name(f".{target.name}-old"))
        _write_record(record, made)
        beside.rename(target)
    finally:
        for left in target.parent.glob(f".{target.name}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _write_record(record: Path, made: Mapping[str, Any]) -> None:
    beside = record.with_name(f".{record.name}-{uuid.uuid4().hex[:8]}")
    beside.write_text(json.dumps(made))
    os.replace(beside, record)


def _is_unchanged(target: Path, record: Path) -> bool:
    """Whether a copy holds the files of its record and nothing else."""
    if not target.is_dir():
        return False
    try:
        made: dict[str, Any] = json.loads(record.read_text())
        found = {name: identity(target / name) for name in _files(target)}
        touched = [name for name in made if found.get(name) != made[name][1]]
        same = found.keys() == made.keys() and all(_is_file_of(target / name, made[name][0]) for name in touched)
        if same and touched:
            _write_record(record, {name: [sha256, found[name]] for name, (sha256, _) in made.items()})
    except (OSError, ValueError, AttributeError, TypeError, LookupError):
        same = False
    if not same:
        log.warning("the copy %s was changed since it was made, so it is made again", target)
    return same


def _is_file_of(file: Path, sha256: str) -> bool:
    return stat.S_ISREG(file.lstat().st_mode) and file_sha256(file) == sha256


def _files(folder: Path) -> list[str]:
    """Names of everything below a folder that is not a real directory."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
