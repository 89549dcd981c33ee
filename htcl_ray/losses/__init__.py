"""What training minimises: contrastive losses, exact over any number of workers."""

from htcl_ray.losses.contrastive import info_nce
from htcl_ray.losses.sigmoid import sigmoid_loss

__all__ = ["info_nce", "sigmoid_loss"]
