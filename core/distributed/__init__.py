"""Training in several processes: their launcher, their process group, and averaging of gradients.

Nothing here knows the network or what a step computes.
"""
