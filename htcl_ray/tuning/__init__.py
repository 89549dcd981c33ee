"""Hyperparameter search without Ray: search space, budgets, trials, and the reports of a study."""
