"""Limits that stages warn at and that judgements of their results use again."""

PLAUSIBLE_LITRES = (0.7, 2.2)
"""Volume of a brain mask (children to large adults); others are reported as suspicious."""
POOR_SCORE = 1.06
"""Normalised mutual information below which a registration is reported as suspicious.

Four scans of three scanners scored 1.11 to 1.15; with the template moved by 2 mm they scored 1.06
to 1.09, by 4 mm 1.03 to 1.05, by 8 mm 1.01 to 1.02.
"""
