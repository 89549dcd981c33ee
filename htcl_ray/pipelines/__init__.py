"""The steps: configuration in, artifacts in the workspace out. They are what uses Ray Data, Train and Tune."""
