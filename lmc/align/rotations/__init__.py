"""Matching by rotations where a group admits them, and folding norms so that streams do."""
