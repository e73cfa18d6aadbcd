"""Generation: from a network and its state to tokens."""
