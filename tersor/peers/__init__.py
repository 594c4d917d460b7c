"""Other engines on the same model: for `tersor bench --against`, `tersor demo` and the benchmarks.

Engines run in processes of their own (`worker`) and take turns (`race`). None is a dependency of Tersor.
"""

from tersor.peers.source import Folder, OnnxFile, Source
from tersor.peers.turns import Measurement, race
from tersor.peers.worker import EngineError, Worker

ENGINES = {
    "openvino": "tersor.peers.engines:Openvino",
    "onnxruntime": "tersor.peers.engines:Onnxruntime",
    "torch": "tersor.peers.engines:TorchEager",
    "torch.compile": "tersor.peers.engines:TorchCompile",
}
"""Name of a peer -> where its class is; a worker process imports it, the asking process does not."""

ON_FILES = ("onnxruntime", "openvino")
"""Those that can be given an ONNX file."""

US = "tersor"
OURS = "tersor.peers.engines:Tersor"

__all__ = [
    "ENGINES",
    "OURS",
    "US",
    "ON_FILES",
    "EngineError",
    "Folder",
    "Measurement",
    "OnnxFile",
    "Source",
    "Worker",
    "race",
]
