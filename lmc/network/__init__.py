"""How weights are put through a module: calls, batches, tasks, statistics, repair."""
