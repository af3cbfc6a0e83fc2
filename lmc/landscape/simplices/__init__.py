"""Mixtures of several networks on a lattice of shares: triangles and simplices."""
