"""Doors to files: NIfTI, templates, weights, BIDS derivatives."""
