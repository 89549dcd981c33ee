"""How good the vectors are: ranking metrics, semantic tasks, recommendation of cold songs, the controls beside them,
the report.

Everything here is a pure function of arrays and tables; `htcl_ray.pipelines.evaluate` brings them from the workspace
and back.
"""
