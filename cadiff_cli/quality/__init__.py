"""How good a result is, without the truth: expected Dice, plausible ranges, outliers."""
