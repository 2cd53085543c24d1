"""The operators in plain torch: the fallback where no kernel is compiled, and the expectation of the tests.

They are written for clarity and bounded memory, not for speed, and never call a kernel.
"""
