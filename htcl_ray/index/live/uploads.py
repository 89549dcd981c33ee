"""Audio that came with a song, kept in the workspace so that another model can embed it again."""

from __future__ import annotations

import hashlib
from pathlib import PurePath

from htcl_ray.audio.formats import EXTENSIONS
from htcl_ray.workspace.storage import Workspace

FOLDER = "uploads"


def store_upload(workspace: Workspace, data: bytes, file_name: str | None) -> str:
    """Keep a file's bytes, and give the URI; the same bytes are kept once for each extension.

    Nothing of the client's file name becomes part of the path but an extension that is one of audio files.
    """
    extension = PurePath(file_name or "").suffix.lower()
    path = f"{FOLDER}/{hashlib.sha256(data).hexdigest()}{extension if extension in EXTENSIONS else ''}"
    if not workspace.exists(path):
        workspace.write_bytes(path, data, durable=True)
    return workspace.location_of(path)
