"""The published RetinaNet experiments on COCO: one recipe, and one file per experiment with its differences.

They never define a network or a transform; classes come from `models` and `core`.
"""
