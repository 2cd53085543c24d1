"""Weights in files: checkpoints, MXNet's .params, pretrained backbones, and the initial weights of a run.

Nothing here computes with a network or reads an image.
"""
