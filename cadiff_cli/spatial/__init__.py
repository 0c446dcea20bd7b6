"""Grids, volumes and resampling.  Knows millimetres, not brains or files."""
