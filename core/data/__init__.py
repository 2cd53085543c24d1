"""Input data: the columnar index of a COCO json, samples, and batches from worker processes.

Nothing here knows the network, its weights or the device that computes.
"""
