"""The engine torch: a training step with its precision, optimizer, learning rate, device and memory.

Nothing here reads images, writes files or decides when a run stops.
"""
