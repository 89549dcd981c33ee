"""HTCL on Ray: music representations learned from sound, words and taste, and served.

Importing this package is light: it loads neither ray nor torch. Start from `htcl_ray.models.HTCL` (the model),
`htcl_ray.audio.log_mel` (its input), `htcl_ray.retrieval.SongIndex` (search) or the `htcl` command.
"""

__version__ = "0.1.0"
