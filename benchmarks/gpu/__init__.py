"""Training and embedding on a GPU: is it right, how fast is it, and where does the time go. `python -m benchmarks.gpu
--help`.
"""
