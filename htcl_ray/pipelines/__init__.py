"""The steps: configuration in, artifacts in the workspace out. Ray Data, Train and Tune are used here and nowhere
below.
"""
