"""cadiff: brain structures and their volumes from a T1-weighted scan, by anatomy diffusion."""

__version__ = "0.1.0"
