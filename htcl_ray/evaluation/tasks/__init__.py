"""Evaluation tasks: semantic retrieval and probes, and recommendation."""
