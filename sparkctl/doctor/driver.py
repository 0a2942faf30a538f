"""As much of CUDA's driver API as a probe needs, by ctypes: no torch, no toolkit."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

from sparkctl.doctor.probes import BOX, ENTRY, SEVEN, WORDS

LIBRARY = "libcuda.so.1"
CLUSTER_DIMENSION = 4  # a launch attribute
DYNAMIC_SHARED = 8  # a function's attribute
UINT32 = 2  # a tensor map's type
MAP_BYTES, MAP_ALIGNMENT = 128, 64
ATTRIBUTES = dict(registers=12, integrated=18, major=75, minor=76, shared=97)  # of a device


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: its value is a union of 64 bytes, of which a cluster's three sizes are the first."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_uint * 16))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)), ("count", c_uint),
    )  # fmt: skip


class DriverError(Exception):
    """A call failed. name: as in CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Driver:
    """The first visible GPU, with a context on it. Raises OSError without a driver, DriverError where it refuses."""

    def __init__(self, *, context: bool = True) -> None:
        self._cuda = ctypes.CDLL(LIBRARY)
        self._call("cuInit", 0)
        self._device, self._context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(self._device), 0)
        if context:
            self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
            self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = c_char_p()
            self._cuda.cuGetErrorName(status, byref(text))
            raise DriverError(text.value.decode() if text.value else f"error {status}")

    def attribute(self, name: str) -> int:
        """One of ATTRIBUTES."""
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), ATTRIBUTES[name], self._device)
        return value.value

    def version(self) -> int:
        """Of CUDA, the newest that the driver runs: 13000 for 13.0."""
        value = c_int()
        self._call("cuDriverGetVersion", byref(value))
        return value.value

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, as CUDA claims them."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def launch(self, cubin: bytes, *, words: int, threads: int, cluster: int, shared: int) -> list[int]:
        """Run a probe's kernel and read the words that its blocks wrote. shared: dynamic bytes a block."""
        module, function = c_void_p(), c_void_p()
        self._call("cuModuleLoadData", byref(module), cubin)
        self._call("cuModuleGetFunction", byref(function), module, ENTRY.encode())
        if shared:
            self._call("cuFuncSetAttribute", function, DYNAMIC_SHARED, shared)
        out, data = self._filled(words, 0), self._filled(WORDS, SEVEN)
        map = self._tensor_map(data)
        values = (ctypes.addressof(out), ctypes.addressof(data), map)
        attribute = _Attribute(CLUSTER_DIMENSION, 0, (c_uint * 16)(cluster, 1, 1))
        config = _Launch(
            (words, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(attribute), 1 if cluster > 1 else 0
        )
        self._call("cuLaunchKernelEx", byref(config), function, (c_void_p * len(values))(*values), None)
        self._call("cuCtxSynchronize")
        written = (c_uint32 * words)()
        self._call("cuMemcpyDtoH_v2", written, out, c_size_t(ctypes.sizeof(written)))
        return list(written)

    def _filled(self, words: int, value: int) -> c_uint64:
        """Device memory that holds `value` in every word."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(4 * words))
        self._call("cuMemsetD32_v2", address, c_uint(value), c_size_t(words))
        return address

    def _tensor_map(self, data: c_uint64) -> int:
        """Where a map of `data` lies on the host: one dimension, BOX words at a time. Zeros for a GPU without TMA."""
        self._map = (ctypes.c_char * (MAP_BYTES + MAP_ALIGNMENT))()
        place = -(-ctypes.addressof(self._map) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        if self.attribute("major") >= 9:
            self._call(
                "cuTensorMapEncodeTiled", c_void_p(place), UINT32, 1, c_void_p(data.value), (c_uint64 * 1)(WORDS),
                (c_uint64 * 1)(4 * WORDS), (c_uint32 * 1)(BOX), (c_uint32 * 1)(1), 0, 0, 0, 0,
            )  # fmt: skip
        return place
