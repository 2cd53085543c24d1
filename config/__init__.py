"""Experiments as typed configs: the schema, its checks and derived fields, overrides, and loading of config files.

It never reads images, trains or writes files; only recipes and the SimpleDet reader import from `core`.
"""
