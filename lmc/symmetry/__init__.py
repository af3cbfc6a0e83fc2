"""Permutation symmetries of modules: found, written down, proven and applied."""
