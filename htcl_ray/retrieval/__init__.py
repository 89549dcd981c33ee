"""Finding songs: the encoder that makes vectors, the index that searches them, and the service that answers with both."""

from htcl_ray.retrieval.index import SongIndex
from htcl_ray.retrieval.ranking import Hit
from htcl_ray.retrieval.service import SearchService
from htcl_ray.retrieval.vectors import Vectors

__all__ = ["Hit", "SearchService", "SongIndex", "Vectors"]
