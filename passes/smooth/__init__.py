"""Smoothing: the same function with values that lose less when they are rounded to few codes."""
