"""Armillary: from text to a language model that its owner can trust."""
