"""Drivers: recurrence over segments, one to a file."""
