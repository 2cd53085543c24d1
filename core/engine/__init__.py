"""The engine torch: a training step, its precision, optimizer and schedule, its device and memory.

Nothing here reads images, writes files or decides when a run stops.
"""
