"""Matching by gradients through doubly stochastic matrices and through the loss."""
