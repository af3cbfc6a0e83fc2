"""Random programs, and the exact symmetries of small ones by brute force."""
