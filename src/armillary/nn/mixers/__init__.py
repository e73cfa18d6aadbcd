"""Mixers, one a file: they move information between positions."""
