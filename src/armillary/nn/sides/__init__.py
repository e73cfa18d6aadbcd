"""What makes side tensors from text, one a file; importing a module registers it."""
