"""Native steps of mechanisms: the operations that their `record` writes on a tape (nn/tape.py)."""
