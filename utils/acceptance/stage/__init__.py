"""The stages of the acceptance, a module with `run(context)` for each, started as a process of its own.

A stage imports no other stage's findings: it writes rows, and `utils.acceptance.report` reads them.
"""
