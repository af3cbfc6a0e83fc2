"""What may move: the permutation symmetries of a network, found, written, proven, applied."""
