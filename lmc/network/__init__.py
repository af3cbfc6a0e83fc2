"""Putting weights through a module: calls, batches, tasks, statistics, repair."""
