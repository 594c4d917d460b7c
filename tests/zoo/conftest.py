"""One thread: small models are no faster with more."""

import torch

torch.set_num_threads(1)
