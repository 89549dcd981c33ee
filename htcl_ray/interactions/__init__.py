"""The logs: user events → sessions, positives, preference pairs. Plain functions on tables."""
