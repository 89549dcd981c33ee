"""Statistics of evaluation: bootstrap intervals, ranking metrics with ties, and collapse of vectors."""
