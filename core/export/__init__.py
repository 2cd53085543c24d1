"""A trained detector as a file that runs without this program, and the certificate that it finds the same.

It never trains, and needs the packages of the extra `export`.
"""
