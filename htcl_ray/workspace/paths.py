"""Local paths and URIs in absolute and canonical form."""

from __future__ import annotations

import os
import re
import urllib.parse

from htcl_ray.errors import WorkspaceError

URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://|file:(?=/)", re.IGNORECASE)
SQLITE = "sqlite:///"


def is_uri(path: str) -> bool:
    """Whether a path begins with a scheme, as `s3://bucket/x` and `file:///x` do."""
    return URI.match(path) is not None


def local_path(path_or_uri: str) -> str | None:
    """The absolute path of a local path or file:// URI (percent-decoded, RFC 8089); None for any other URI.

    Relative paths are relative to the working directory of this process, and `~` is the home directory. Raises
    WorkspaceError for a file:// URI with the name of another host.
    """
    uri = URI.match(path_or_uri)
    if uri is None:
        return os.path.abspath(os.path.expanduser(path_or_uri))
    if (uri["scheme"] or "file").lower() != "file":
        return None
    host, _, path = path_or_uri[uri.end() :].partition("/")
    if uri["scheme"] and host.lower() not in ("", "localhost"):
        raise WorkspaceError(
            f"'{path_or_uri}' names the host '{host}'; expected file:///path, which is a file of this machine"
        )
    return os.path.abspath("/" + os.fsdecode(urllib.parse.unquote_to_bytes(path)))


def absolute(path_or_uri: str) -> str:
    """The absolute local path of a path or file:// URI; any other URI unchanged. Raises WorkspaceError."""
    path = local_path(path_or_uri)
    return path_or_uri if path is None else path


def canonical(path_or_uri: str) -> str:
    """The canonical form of a path or URI: equal for relative, absolute, linked and file:// forms of one file."""
    path = local_path(path_or_uri)
    return path_or_uri if path is None else os.path.realpath(path)


def is_relative(path_or_uri: str) -> bool:
    """Whether a path depends on the working directory."""
    return not is_uri(path_or_uri) and not os.path.isabs(os.path.expanduser(path_or_uri))


def folder_or_name(name_or_path: str) -> str:
    """The absolute path of a folder that exists, else the name unchanged, such as that of a model on a hub."""
    folder = absolute(name_or_path)
    return folder if os.path.isdir(folder) else name_or_path


def absolute_sqlite(uri: str) -> str:
    """A `sqlite:///FILE` URI with an absolute file; any other URI unchanged."""
    file = uri.removeprefix(SQLITE)
    return uri if file == uri or file.startswith(":") else SQLITE + absolute(file)
