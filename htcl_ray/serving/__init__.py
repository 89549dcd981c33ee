"""The HTTP application on Ray Serve."""
