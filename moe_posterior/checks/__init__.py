"""Checks at the door: what users bring is turned into checked values, or refused by name."""
