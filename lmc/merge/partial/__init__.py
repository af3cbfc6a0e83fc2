"""Merging into networks of other widths: ZipIt and PLeaS."""
