"""The engine MXNet 1.9.1: a training step and a test by its executor, its SGD and its kvstore.

Nothing here is imported unless a run asks for that engine.
"""
