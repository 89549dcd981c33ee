"""The workspace: storage, manifests, artifacts, local copies, paths and credentials."""
