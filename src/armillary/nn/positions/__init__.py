"""Positions, one a file; each acts at the sites that its settings name (embed, rotate, bias, decay)."""
