"""Optimal-transport fusion: networks of other widths spread over the units of one."""
