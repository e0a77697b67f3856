"""How soon an alarm for drifting calibration comes, whom it names, and how often it is false."""
