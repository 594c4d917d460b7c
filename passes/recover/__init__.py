"""Repairing what lossy passes took: towards the program as it was before them."""
