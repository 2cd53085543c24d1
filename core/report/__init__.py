"""Output for the user: the log, AP, pictures, and --dry-run.

Nothing here changes a run or its weights.
"""
