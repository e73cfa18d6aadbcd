"""Channel mixers, one a file: they work within a position."""
