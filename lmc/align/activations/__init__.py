"""Matching by activations: where units are seen, what they do, which belong together."""
