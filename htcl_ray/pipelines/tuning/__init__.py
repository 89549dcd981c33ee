"""Hyperparameter search with Ray Tune and Optuna."""
