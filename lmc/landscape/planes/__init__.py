"""Planes in weight space: through three networks, around one, along a trajectory."""
