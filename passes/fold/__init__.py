"""Exact rewritings of weights: the same function, fewer parameters and operations."""
