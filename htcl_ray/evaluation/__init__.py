"""Evaluation of embeddings: ranking metrics, semantic and recommendation tasks with controls, gate, and report.

Everything here is a pure function of arrays and tables; `htcl_ray.pipelines.evaluate` reads them from the workspace and
writes the report.
"""
