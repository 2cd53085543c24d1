"""The reader of SimpleDet's config files, which translates them into a `Config` with notes on ignored settings.

It never imports SimpleDet or MXNet; a file that it does not support raises ValueError.
"""
