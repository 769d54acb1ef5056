"""What a CPU does in bfloat16 by C of our own, built once a machine: LayerNorm with SiLU and the images' error, each in
one pass over memory, and the recurrences (recurrence.py).

Torch's own go over memory several times, and its sums of the weight gradients of a bfloat16 LayerNorm are bfloat16: at
the sizes here they come out wrong by 3 to 30%. These sums are float32.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dreamer.config import ConfigError

_SOURCES = ("csrc/norm_silu.c", "csrc/image_distance.c", "csrc/recurrence.c")
_HEADERS = ("csrc/lanes.h", "csrc/tiles.h")
# Sums may be reordered, which is what makes them fast; infinities and NaN behave as they should.
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # where there are such; compilers shy away from them on their own
UNIT = 16  # of the columns
_SERIAL = 4096  # values below which a second thread costs more than it brings


class Kernels:
    """The built library.

    Attributes:
        recurrent: the processor has matrix registers, which the recurrences need
    """

    def __init__(self, library: ctypes.CDLL):
        self.library, self.recurrent = library, bool(library.has_tiles())
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._forward, self._backward = library.norm_silu_forward, library.norm_silu_backward
        self._forward.argtypes = [pointer] * 4 + [size, size, ctypes.c_float, ctypes.c_int]
        self._backward.argtypes = [pointer] * 7 + [size, size, ctypes.c_float, ctypes.c_int]
        self._distance = library.image_distance
        self._distance.argtypes = [pointer, pointer, ctypes.c_float, pointer, pointer, size, ctypes.c_int]
        self._forward.restype = self._backward.restype = self._distance.restype = None

    def __deepcopy__(self, memo: dict) -> "Kernels":
        return self

    def __reduce__(self) -> tuple[Callable[[], "Kernels"], tuple[()]]:
        return load, ()  # a process loads its own

    def norm_silu(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """silu(layer_norm(x)) over the last dimension.

        Args:
            x: (..., C) bfloat16 on the CPU, C a multiple of `UNIT`
            weight, bias: (C,) float32

        Raises:
            ValueError: C is no such multiple
        """
        if x.shape[-1] % UNIT:
            raise ValueError(f"{x.shape[-1]} columns, not a multiple of {UNIT}")
        return _NormSiLU.apply(x, weight, bias, eps, self)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, columns = torch.empty_like(x), x.shape[-1]
        self._forward(*_pointers(x, weight, bias, y), x.numel() // columns, columns, eps, _threads(x))
        return y

    def backward(
        self, x: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, columns, threads = torch.empty_like(x), x.shape[-1], _threads(x)
        shares = torch.empty(2, threads, columns)
        pointers = _pointers(x, gradient, weight, bias, dx, *shares)
        self._backward(*pointers, x.numel() // columns, columns, eps, threads)
        return dx, *shares.sum(1)

    def image_distance(self, mean: Tensor, target: Tensor, focus: float) -> tuple[Tensor, Tensor]:
        """See `ImageDistance`.

        Args:
            mean: (N, 32, 32, 2, 6) bfloat16, as `tiles`
            target: (N, 64, 64, 3) float32

        Returns:
            squared error of each image, (N,) float32, and the weighted difference, as `mean`
        """
        mean, target = mean.contiguous(), target.contiguous()
        weighted, distance = torch.empty_like(mean), torch.empty(len(mean))
        tensors = _pointers(mean, target, weighted, distance)
        self._distance(*tensors[:2], focus, *tensors[2:], len(mean), torch.get_num_threads())
        return distance, weighted


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernels: Kernels) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.eps, ctx.kernels = eps, kernels
        return kernels.forward(x, weight, bias, eps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return *ctx.kernels.backward(x, gradient.contiguous(), weight, bias, ctx.eps), None, None


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > _SERIAL else 1


@functools.cache
def load() -> Kernels:
    """Builds what is not built yet, in a few seconds, into the user's cache directory.

    Raises:
        ConfigError: there is no C compiler, or it fails
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise ConfigError("compute.compile: true needs a C compiler and finds none; install gcc, or set it to false")
    here = Path(__file__).parent
    source = b"".join((here / name).read_bytes() for name in _SOURCES + _HEADERS)
    key = hashlib.sha256(source + repr((compiler, _FLAGS, _processor())).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mario-dreamer"
    library = cache / f"kernels-{key}.so"
    if not library.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:  # no home that can be written to, as in some containers
            cache = Path(tempfile.mkdtemp(prefix="mario-dreamer-"))
            library = cache / library.name
        temporary = cache / f"{library.name}.{os.getpid()}"
        built = subprocess.run(
            [compiler, *_FLAGS, *(str(here / name) for name in _SOURCES), "-o", str(temporary), "-lm"],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            reason = (built.stderr.strip().splitlines() or ["no message"])[0]
            raise ConfigError(
                f"compute.compile: {compiler} cannot build dreamer/csrc ({reason}); set it to false, or CC to another"
            )
        temporary.rename(library)
    return Kernels(ctypes.CDLL(str(library)))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
