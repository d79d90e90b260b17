"""What the method costs, as ratios within one run."""
