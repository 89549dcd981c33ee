"""Index engines: vector structures, searched by row number."""
