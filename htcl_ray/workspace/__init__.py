"""The workspace: storage, artifacts, local copies, paths and credentials."""
