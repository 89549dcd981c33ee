"""The model: audio tower, text tower, heads and fusion network, and its folder on disk."""

from htcl_ray.models.folder import weights_fingerprint
from htcl_ray.models.htcl import HTCL

__all__ = ["HTCL", "weights_fingerprint"]
