"""Groups of interchangeable units as data and as index algebra; knows nothing of modules."""
