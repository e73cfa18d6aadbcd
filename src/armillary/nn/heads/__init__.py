"""Heads, one a file: what is read off the last hidden states."""
