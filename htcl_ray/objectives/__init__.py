"""What training minimises: contrastive losses, exact over any number of workers."""

from htcl_ray.objectives.contrastive import info_nce
from htcl_ray.objectives.sigmoid import sigmoid_loss

__all__ = ["info_nce", "sigmoid_loss"]
