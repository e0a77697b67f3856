"""Argument checks: what users pass is turned into checked values, or refused by name."""
