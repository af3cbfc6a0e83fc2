"""Git Re-Basin's weight matching: algorithm 1, its gains, its blocks, its nested problems; checkpoints on disk."""
