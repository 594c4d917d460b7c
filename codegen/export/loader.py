"""Runs the exported model that lies in this folder: Python with numpy, no torch, nothing of Tersor.

model = load()                               # the folder's library, weights.bin and signature.json
outputs = model(input_ids=ids)               # numpy arrays by name in, a dict of numpy arrays out
s = model.session(threads=2)                 # threads, workspace and states of one caller
s.run("prefill", input_ids=ids)
step = s.bound("decode", input_ids=ids)      # step() runs it on what the arrays hold by then
"""

import ast
import ctypes
import json
import pathlib
import sys
import threading

import numpy as np

LIBRARY = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")


class Error(Exception):
    """The library refused: `status` is its code."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def load(folder=None, threads=1):
    """The model in a folder, that of this file by default."""
    return Model(pathlib.Path(folder or pathlib.Path(__file__).parent), threads)


class Model:
    """An exported model. Calling it runs the function main, or the only one, in a session of each Python thread."""

    def __init__(self, folder, threads=1):
        with open(folder / "signature.json", encoding="utf-8") as file:
            self.signature = json.load(file)
        self.name, self.threads = self.signature["name"], threads
        self.functions = {f["name"]: Function(f) for f in self.signature["functions"]}
        self.library = ctypes.CDLL(str((folder / LIBRARY.format(self.name)).resolve()))
        self._sessions = threading.local()
        self.call("message").restype = ctypes.c_char_p
        self.call("session_bytes").restype = ctypes.c_size_t
        self.weights = _Weights()
        self.check(self.call("model_open")(ctypes.byref(self.weights), str(folder / "weights.bin").encode()))

    def call(self, name):
        """A function of the library."""
        return getattr(self.library, f"{self.name}_{name}")

    def check(self, status):
        """Raises `Error` for any status but 0."""
        if status:
            raise Error(status, self.call("message")(status).decode())

    def verify(self):
        """Compares the checksum of all weights."""
        self.check(self.call("model_check")(ctypes.byref(self.weights)))

    def session(self, threads=None, cpus=None):
        """A session: states of its own, all zeros."""
        return Session(self, self.threads if threads is None else threads, cpus)

    def __call__(self, **inputs):
        name = "main" if "main" in self.functions else next(iter(self.functions))
        if not hasattr(self._sessions, "own"):
            self._sessions.own = self.session()
        return self._sessions.own.run(name, **inputs)


class Session:
    """Threads, workspace and states of one caller."""

    def __init__(self, model, threads, cpus):
        self.model, self._handle = model, ctypes.c_void_p()
        options = _Options(threads, (ctypes.c_int * len(cpus))(*cpus) if cpus else None, None, 0)
        create = model.call("session_create")
        model.check(create(ctypes.byref(self._handle), ctypes.byref(model.weights), ctypes.byref(options)))

    def run(self, name, **inputs):
        """Runs a function: numpy arrays by name in, a dict of numpy arrays out."""
        return self.bound(name, **inputs)()

    def bound(self, name, **inputs):
        """What runs a function on these very arrays, whose contents may change, and gives the same arrays each time.

        An array of another byte order or layout is copied now, and no more looked at.
        """
        function = self.model.functions[name]
        arguments, outputs, alive = function.bind(inputs)
        code, pointer = self.model.call(function.symbol), ctypes.byref(arguments)

        def call():
            status = code(self._handle, pointer)
            if status:
                self.model.check(status)
            return outputs

        call.inputs = alive  # the arguments point to them
        return call

    def reset(self):
        """All states are zeros again."""
        self.model.check(self.model.call("session_reset")(self._handle))

    def __del__(self):
        if getattr(self, "_handle", None):
            self.model.call("session_destroy")(self._handle)


class Function:
    """How one function is called."""

    def __init__(self, description):
        self.symbol = description["symbol"]
        self.dims = description["dims"]
        self.inputs, self.outputs = description["inputs"], description["outputs"]
        fields = [(dim["field"], ctypes.c_int64) for dim in self.dims.values()]
        for tensor in (*self.inputs, *self.outputs):
            fields += [(tensor["field"], ctypes.c_void_p), (tensor["field"] + "_count", ctypes.c_size_t)]
        self.structure = type(self.symbol, (ctypes.Structure,), {"_fields_": fields})

    def bind(self, inputs):
        """The C arguments for some inputs, the outputs they point to, and what must stay alive meanwhile."""
        wanted = [tensor["name"] for tensor in self.inputs]
        if set(inputs) != set(wanted):
            raise TypeError(
                f"{self.symbol} takes {', '.join(wanted)}; given: {', '.join(inputs) or 'nothing'}"
            )
        arguments, sizes = self.structure(), {}
        arrays = {t["name"]: _array(inputs[t["name"]], t) for t in self.inputs}
        for tensor in self.inputs:
            array = arrays[tensor["name"]]
            if array.ndim != len(tensor["shape"]):
                raise ValueError(f"{tensor['name']} has {array.ndim} dimensions, not {len(tensor['shape'])}")
            for axis, dim in enumerate(tensor["shape"]):
                if dim in self.dims:
                    sizes.setdefault(dim, array.shape[axis])
        for dim, size in sizes.items():
            setattr(arguments, self.dims[dim]["field"], size)
        outputs = {}
        for tensor in self.inputs:
            array, shape = arrays[tensor["name"]], _shape(tensor["shape"], sizes)
            if array.shape != shape:
                raise ValueError(f"{tensor['name']} is {array.shape}, not {shape}")
            self._set(arguments, tensor, array)
        for tensor in self.outputs:
            outputs[tensor["name"]] = np.empty(_shape(tensor["shape"], sizes), _dtype(tensor["dtype"]))
            self._set(arguments, tensor, outputs[tensor["name"]])
        return arguments, outputs, arrays

    def _set(self, arguments, tensor, array):
        setattr(arguments, tensor["field"], array.ctypes.data)
        setattr(arguments, tensor["field"] + "_count", array.size)


class _Weights(ctypes.Structure):
    _fields_ = [("weights", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("mapping", ctypes.c_void_p)]


class _Options(ctypes.Structure):
    _fields_ = [
        ("threads", ctypes.c_int),
        ("cpus", ctypes.POINTER(ctypes.c_int)),
        ("memory", ctypes.c_void_p),
        ("memory_bytes", ctypes.c_size_t),
    ]


def _dtype(name):
    """numpy's dtype; bfloat16, which numpy lacks, as the bits of its numbers."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def _array(value, tensor):
    array, dtype = np.asarray(value), _dtype(tensor["dtype"])
    if array.dtype != dtype and not (array.ndim == 0 and np.can_cast(array, dtype, "same_kind")):
        raise TypeError(f"{tensor['name']} is {array.dtype}, not {dtype}")
    return np.asarray(array, dtype, order="C")


def _shape(shape, sizes):
    return tuple(_size(ast.parse(str(dim), mode="eval").body, sizes) for dim in shape)


def _size(node, sizes):
    """The value of a dimension: integers, names, + - * and powers."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp):
        return -_size(node.operand, sizes)
    left, right = _size(node.left, sizes), _size(node.right, sizes)
    operations = {
        ast.Add: left.__add__,
        ast.Sub: left.__sub__,
        ast.Mult: left.__mul__,
        ast.Pow: left.__pow__,
    }
    return operations[type(node.op)](right)
