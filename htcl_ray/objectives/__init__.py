"""What training minimises: contrastive losses, exact over any number of workers."""

from htcl_ray.objectives.contrastive import info_nce

__all__ = ["info_nce"]
