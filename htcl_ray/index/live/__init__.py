"""Updates to an index that is being served: the update log, its replay, and the activation of index versions."""
