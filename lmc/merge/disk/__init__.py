"""Merging checkpoints from disk to disk, a chunk at a time, with a recipe to repeat it."""
