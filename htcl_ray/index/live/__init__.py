"""Live indexes: activation, the update log, and its replay on the index that is served."""
