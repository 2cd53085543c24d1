"""The demo experiment and its recipe for small objects on CPUs.

They never define a network or a transform; the recipe modifies that of `config.NASFPN`.
"""
