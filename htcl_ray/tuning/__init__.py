"""What a search varies, how long its trials last, and what came of them. Plain functions; Ray Tune runs them in
pipelines/.
"""
