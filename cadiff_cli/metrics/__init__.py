"""Agreement of two label maps: thin over MONAI."""
