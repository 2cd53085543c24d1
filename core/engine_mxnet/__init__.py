"""The engine MXNet 1.9.1: a training step and a test by MXNet's executor, SGD and kvstore.

Nothing here is imported unless that engine is chosen.
"""
