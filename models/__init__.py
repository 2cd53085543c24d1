"""Detectors as symbols, with the input transforms and metrics that belong to them.

Models never run the network or load weights, and import neither `config` (except for types) nor `core`.
"""
