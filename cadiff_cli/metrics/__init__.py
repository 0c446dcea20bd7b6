"""Agreement of two label maps: a thin layer over MONAI."""
