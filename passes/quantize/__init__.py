"""Numbers of fewer bits: weights and activations as codes on a grid, and integer products of codes."""
