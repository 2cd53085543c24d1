"""Stage 3: the device against the CPU, by network, by operator and by whole steps.

Nothing here measures speed.
"""
