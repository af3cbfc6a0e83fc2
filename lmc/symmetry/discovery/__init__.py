"""From the graph of a module to its groups: interpret the operators, solve, name, explain."""
