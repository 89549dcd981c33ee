"""Turn interaction logs into events, sessions, preference pairs and explicit negatives. Functions on tables."""
