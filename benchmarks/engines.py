"""Engines that only the benchmarks measure, beside those of `tersor.peers`."""

from __future__ import annotations

from tersor.peers import ENGINES as PEERS
from tersor.peers import OURS, US
from tersor.peers.engines import Call, Torch
from tersor.peers.source import Inputs, Source


class TvmDefault(Torch):
    """Apache TVM's own importer and default CPU pipeline: what TVM gives without our lowering and kernels."""

    def load(self, source: Source, inputs: Inputs) -> Call:
        import torch
        import tvm
        from tvm import relax
        from tvm.relax.frontend.torch import from_exported_program

        self.version = f"apache-tvm {tvm.__version__}"
        exported = torch.export.export(self.module(source), (), kwargs=self.tensors(inputs), strict=False)
        with torch.no_grad():
            module = from_exported_program(exported)
        cpu = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}
        machine = relax.VirtualMachine(tvm.compile(module, tvm.target.Target(cpu)), tvm.cpu())
        arguments = [tvm.runtime.tensor(value) for value in inputs.values()]
        return lambda: machine["main"](*arguments)[0].numpy()


ENGINES = {US: OURS, **PEERS, "tvm": "benchmarks.engines:TvmDefault"}
"""Every engine by name."""

BY_DEFAULT = tuple(name for name in ENGINES if name != "tvm")
"""TVM's default pipeline takes seconds to minutes a call: it is measured when asked for."""
