"""A run on its machine: the experiment's folder, atomic files, signals, the parent process, guarded phases of a step.

Nothing here computes with a network.
"""
