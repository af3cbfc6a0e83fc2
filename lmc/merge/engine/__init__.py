"""The engine of merging without data: a rule for one tensor becomes a method on models and checkpoints."""
