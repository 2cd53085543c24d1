"""Images and boxes on their way to a training step: a COCO json as columns, samples, batches by worker processes.

Nothing here knows the network, its weights or the device that computes.
"""
