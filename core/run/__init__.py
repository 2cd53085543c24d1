"""A run's place on disk and its end: the experiment's folder, whole files, signals, the parent process.

Nothing here knows what is computed.
"""
