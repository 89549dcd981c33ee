"""Entry points for Ray's own `serve` command.

In code, import Ray Serve by `from ray import serve`, since this folder has the same name.
"""
