"""Makes the helpers beside the tests importable: pytest's importlib mode leaves this folder off the path."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
