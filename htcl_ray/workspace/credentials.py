"""Credentials inside URIs, `s3://KEY:SECRET@bucket` or `http://host/?token=…`: used as they are, never written, printed
or sent back.

Settings, manifests and every error of this package go through here; the real value stays in the attributes of the
configuration.
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
"""Userinfo of a URI, also of one whose password was not percent-encoded, and parameters whose names are those of
secrets."""
REMOVED = "***"


def without_credentials(text: str) -> str:
    """A URI, or a text with URIs in it, with `***` in place of user names, passwords, keys and signatures."""
    return (
        CREDENTIALS.sub(lambda found: f"{found['name'] or ''}{REMOVED}{'@' if found['user'] else ''}", text)
        if "://" in text
        else text
    )


def lacks_credentials(text: str) -> bool:
    """Whether credentials were taken out of a URI, which cannot be used then."""
    return "://" in text and any(REMOVED in found[0] for found in CREDENTIALS.finditer(text))


def tree_without_credentials(tree: Any) -> Any:
    """A tree of mappings, lists and tuples with every text in it without credentials."""
    if isinstance(tree, str):
        return without_credentials(tree)
    if isinstance(tree, Mapping):
        return {name: tree_without_credentials(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [tree_without_credentials(value) for value in tree]
    return tree
