"""Removes what does no work."""
