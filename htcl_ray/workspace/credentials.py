"""Removal of credentials in URIs such as `s3://KEY:SECRET@bucket` from everything that is written, printed or sent.

Settings, manifests and all errors of this package use it. The attributes of the configuration keep the credentials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NAMED = r"[\w.-]*(?:key|token|secret|passw|pwd|passphrase|credential|signature|auth(?!or))[\w.-]*|sig"
CREDENTIALS = re.compile(
    rf"(?P<user>(?<=://)(?:[^\s/?#]*@|[^\s/?#@:\[]*:(?!\d+(?:[/?#\s]|$))\S*@))|(?P<name>[?&;#](?:{_NAMED})=)[^\s&;#'\"]+",
    re.IGNORECASE,
)
"""The userinfo of a URI, also with a password that is not percent-encoded, and parameters with names of secrets."""
REMOVED = "***"


def without_credentials(text: str) -> str:
    """Replace user names, passwords, keys and signatures in the URIs of a text by `***`."""
    if "://" not in text:
        return text
    return CREDENTIALS.sub(lambda match: f"{match['name'] or ''}{REMOVED}{'@' if match['user'] else ''}", text)


def lacks_credentials(text: str) -> bool:
    """Whether credentials were removed from a URI, so that it cannot be opened."""
    return "://" in text and any(REMOVED in match[0] for match in CREDENTIALS.finditer(text))


def tree_without_credentials(tree: Any) -> Any:
    """Remove the credentials from all strings in a tree of mappings, lists and tuples."""
    if isinstance(tree, str):
        return without_credentials(tree)
    if isinstance(tree, Mapping):
        return {name: tree_without_credentials(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [tree_without_credentials(value) for value in tree]
    return tree
