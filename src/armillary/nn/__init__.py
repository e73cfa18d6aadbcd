"""The bare network: mechanisms, and how they are composed. Knows nothing of text, files or training."""
