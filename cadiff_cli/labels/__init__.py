"""Parcellations by name, and the label ids of other software."""
