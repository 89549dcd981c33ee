"""`serve run serve.app:build_app workspace=/path preset=demo`, or `serve run serve.app:app` for ./workspace.

The same application as `htcl serve`. Importing this module starts and loads nothing.
"""

from typing import Any

from htcl_ray.serving.application import build_app

__all__ = ["app", "build_app"]  # noqa: F822 - `app` comes from __getattr__


def __getattr__(name: str) -> Any:
    """Build `app` on first use, since it requires a workspace with an index."""
    if name == "app":
        return build_app({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
