"""Which move: permutations and couplings that bring one network onto another."""
