"""The GPU acceptance: its driver, its page, and what its stages share.

Nothing of the product imports it.
"""
