"""Grids, volumes and resampling, in millimetres; no brains, no files."""
