"""Use an installed wheel from an unrelated folder: every part is there, and a small model compiles and runs.

Usage: python check_wheel.py SITE_PACKAGES   (where tersor must have been installed)
"""

import sys
from pathlib import Path

import torch

import tersor
import tersor.targets

site = Path(sys.argv[1])
for module in (tersor, tersor.targets):
    assert Path(module.__file__).is_relative_to(site), f"{module.__name__} comes from {module.__file__}"
assert "x86-64-v3" in tersor.targets.names(), "the catalog of targets is missing from the wheel"

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)).eval()
x = torch.randn(4, 32)
compiled = tersor.compile(model, (x,))
with torch.no_grad():
    error = (compiled(x)[0] - model(x)).abs().max().item()
assert error < 1e-4, f"the compiled model differs from torch by {error}"
print(f"wheel {tersor.__version__}: compiled and ran a small model, error {error:.1e}")
