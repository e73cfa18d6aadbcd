"""Families of open checkpoints, one a file: a table that pairs their folders with our networks."""
