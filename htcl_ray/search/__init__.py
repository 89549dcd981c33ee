"""Search: requests to results, without HTTP and without Ray."""
