"""Alignments looked at: methods side by side, a matching in steps, singular vectors, barriers over training."""
