"""ggml, llama.cpp's library, through ctypes: finding it, its functions, and where its CPU backend wants a weight.

TORCH_INT4_LLAMA_CPP names a folder that holds libggml.so with its parts; without it, the system's is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import CDLL, CFUNCTYPE, POINTER, RTLD_GLOBAL, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t
from ctypes import c_void_p as c_handle
from ctypes.util import find_library
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch_int4 import Int4Error

VARIABLE = "TORCH_INT4_LLAMA_CPP"
F32, TYPES = 0, {"Q4_0": 2, "Q4_1": 3}  # enum ggml_type
CPU_DEVICE, USAGE_WEIGHTS = 0, 1


def library() -> CDLL | None:
    """ggml with its CPU backend, or None if there is none on this machine.

    Raises:
        Int4Error: if the variable names a folder without it, or a library that does not load.
    """
    return _load(os.environ.get(VARIABLE))


@cache
def _load(folder: str | None) -> CDLL | None:
    found = [name] if (name := find_library("ggml")) else []
    if folder:
        paths = sorted(Path(folder).rglob("libggml*.so"), key=lambda path: (path.name != "libggml-base.so", path.name))
        ordered = [path for path in paths if path.name in ("libggml-base.so", "libggml-cpu.so")]
        found = [str(path) for path in [*ordered, *(path for path in paths if path.name == "libggml.so")]]
        if not any(name.endswith("/libggml.so") for name in found):
            raise Int4Error(f"{VARIABLE}={folder}: no libggml.so there; name the folder that a shared build put it in")
    if not found:
        return None
    try:
        # The parts first, for the last one to find them wherever they lie; it exports what all of them do.
        ggml = [CDLL(name, mode=RTLD_GLOBAL) for name in found][-1]
        _declare(ggml)
    except (OSError, AttributeError) as error:
        raise Int4Error(f"llama.cpp's library {found[-1]} does not work: {error}; set {VARIABLE} to another") from error
    if not ggml.ggml_backend_dev_by_type(CPU_DEVICE):
        # Built with one backend per processor: they lie beside the library, or where a system's own is told to look.
        ggml.ggml_backend_load_all_from_path(str(Path(found[-1]).parent).encode() if folder else None)
    if not ggml.ggml_backend_dev_by_type(CPU_DEVICE):
        raise Int4Error(f"llama.cpp's library {found[-1]} has no CPU backend; set {VARIABLE} to a folder with one")
    return ggml


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_handle), ("no_alloc", c_bool))


_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # the result, then the arguments; a handle is a void*
    "ggml_init": (c_handle, _InitParams),
    "ggml_free": (None, c_handle),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_handle, c_handle, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_handle, c_handle, c_handle, c_handle),
    "ggml_new_graph_custom": (c_handle, c_handle, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_handle, c_handle),
    "ggml_graph_n_nodes": (c_int, c_handle),
    "ggml_backend_load_all_from_path": (None, c_char_p),
    "ggml_backend_dev_by_type": (c_handle, c_int),
    "ggml_backend_dev_init": (c_handle, c_handle, c_char_p),
    "ggml_backend_dev_backend_reg": (c_handle, c_handle),
    "ggml_backend_dev_buffer_type": (c_handle, c_handle),
    "ggml_backend_dev_supports_op": (c_bool, c_handle, c_handle),
    "ggml_backend_reg_get_proc_address": (c_handle, c_handle, c_char_p),
    "ggml_backend_free": (None, c_handle),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_handle, c_handle, c_handle),
    "ggml_backend_buffer_set_usage": (None, c_handle, c_int),
    "ggml_backend_buffer_name": (c_char_p, c_handle),
    "ggml_backend_buffer_free": (None, c_handle),
    "ggml_backend_cpu_buffer_from_ptr": (c_handle, c_handle, c_size_t),
    "ggml_backend_tensor_alloc": (c_int, c_handle, c_handle, c_handle),
    "ggml_backend_tensor_set": (None, c_handle, c_handle, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_handle, c_handle),
}


def _declare(ggml: CDLL) -> None:
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    if hasattr(ggml, "ggml_version"):  # since 2025
        ggml.ggml_version.restype = c_char_p


def procedure(ggml: CDLL, device: int, name: bytes, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the CPU backend that it exports by name only, as it may be loaded later."""
    address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_dev_backend_reg(device), name)
    if not address:
        raise Int4Error(f"llama.cpp's CPU backend has no {name.decode()}: take a version of 2025 or newer")
    return CFUNCTYPE(result, *arguments)(address)


def context(ggml: CDLL, tensors: int) -> int:
    """Room for the descriptions of so many tensors, and of a graph of them; their data lies elsewhere."""
    size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(tensors, False)
    return int(ggml.ggml_init(_InitParams(size, None, True)))


def best_buffer_type(ggml: CDLL, device: int, shape: tuple[int, int, int]) -> int:
    """The first of the backend's extra buffer types whose kernels take the product, else the plain one."""
    extra = procedure(ggml, device, b"ggml_backend_dev_get_extra_bufts", POINTER(c_handle), c_handle)(device)
    for kind in takewhile(bool, (extra[i] for i in count())) if extra else ():
        room = context(ggml, 3)
        weight = ggml.ggml_new_tensor_2d(room, *shape)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(room, kind)
        product = ggml.ggml_mul_mat(room, weight, ggml.ggml_new_tensor_2d(room, F32, shape[1], 1))
        takes = buffer and ggml.ggml_backend_dev_supports_op(device, product)
        if buffer:
            ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(room)
        if takes:
            return int(kind)
    return int(ggml.ggml_backend_dev_buffer_type(device))
