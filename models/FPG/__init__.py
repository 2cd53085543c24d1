"""The path-aggregation pyramid of SimpleDet's module `models.FPG`.

It never adds a backbone, a head or input transforms; recipes combine it with those of the other packages.
"""
