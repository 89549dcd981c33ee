"""Entry points for Ray's own `serve` command. In code, always `from ray import serve`: this folder has the same
name.
"""
