"""Methods that need weights only: averages, task vectors, sign elections, subspaces."""
