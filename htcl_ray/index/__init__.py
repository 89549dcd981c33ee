"""The vector index: building, searching, updating and persisting it, by song id."""
