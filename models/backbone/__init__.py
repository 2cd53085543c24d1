"""ResNet backbones as symbols.

They never load pretrained weights, which `core.weights` does, and do not depend on the detector.
"""
