"""Local paths: absolute where a command starts, and canonical where two spellings must mean one file."""

from __future__ import annotations

import os
import urllib.parse

FILE_URI = "file://"
SQLITE = "sqlite:///"


def absolute(path_or_uri: str) -> str:
    """The absolute local path of a path or `file://` URI (percent-decoded); any other URI as it is.

    Relative paths are relative to the working directory of this process, and `~` is the home directory.
    """
    if path_or_uri.startswith(FILE_URI):
        path_or_uri = urllib.parse.unquote(path_or_uri.removeprefix(FILE_URI).removeprefix("localhost"))
    return path_or_uri if "://" in path_or_uri else os.path.abspath(os.path.expanduser(path_or_uri))


def canonical(path_or_uri: str) -> str:
    """What a path or URI resolves to: the same text for a relative path, an absolute one, a symbolic link and a `file://` URI."""
    path = absolute(path_or_uri)
    return path if "://" in path else os.path.realpath(path)


def is_relative(path_or_uri: str) -> bool:
    """Whether a path depends on the working directory."""
    return "://" not in path_or_uri and not os.path.isabs(os.path.expanduser(path_or_uri))


def folder_or_name(name_or_path: str) -> str:
    """The absolute path of a folder that exists, else the name as it is, for instance of a model on a hub."""
    folder = absolute(name_or_path)
    return folder if os.path.isdir(folder) else name_or_path


def absolute_sqlite(uri: str) -> str:
    """A `sqlite:///FILE` URI with an absolute file; any other as it is."""
    file = uri.removeprefix(SQLITE)
    return uri if file == uri or file.startswith(":") else SQLITE + absolute(file)
