"""All methods on all data sets with all seeds: train the heads, keep what they say, measure, tabulate."""
