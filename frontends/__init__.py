"""Outside models in: torch.export, transformers."""
