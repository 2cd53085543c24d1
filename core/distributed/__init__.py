"""The processes that train together: their start, their process group, their averaged gradients.

Nothing here knows the network or what a step computes.
"""
