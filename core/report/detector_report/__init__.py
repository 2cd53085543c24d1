"""The report of a test: what a detector finds, misses and confuses, as one HTML file."""
