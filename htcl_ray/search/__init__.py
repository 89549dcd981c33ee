"""From a search request to its results, without HTTP and without Ray."""
