"""The C kernels against float64, and what a person is told where they cannot be built."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dreamer import kernels
from dreamer.image_loss import ImageDistance
from dreamer.networks import NormSiLU, tiles

EPS = 1e-3


def both(rows: int, columns: int, threads: int, library: kernels.Kernels | None = None):
    """Output and gradients of x, weight and bias: by the kernels in bfloat16 and by torch in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = (2 * torch.randn(rows, columns, generator=generator) + 0.3).bfloat16()
    weight, bias = torch.randn(2, columns, generator=generator)
    gradient = torch.randn(rows, columns, generator=generator).bfloat16()
    found = []
    torch.set_num_threads(threads)
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [part.detach().clone().requires_grad_() for part in (x, weight, bias)]
        if dtype == torch.float64:
            inputs = [part.detach().double().requires_grad_() for part in inputs]
            y = F.silu(F.layer_norm(inputs[0], (columns,), inputs[1], inputs[2], EPS))
        else:
            y = (library or kernels.load()).norm_silu(*inputs, EPS)
        found.append((y, *torch.autograd.grad(y, inputs, gradient.to(dtype))))
    return found


# Fewer rows than threads, groups of 16 rows that are not full, one vector a row and many.
SHAPES = [(1, 16), (1031, 16), (333, 32), (257, 64), (100, 48), (7, 1536), (40_000, 128)]


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equal_to_float64(rows, columns, threads):
    check(*both(rows, columns, threads))


def check(fast: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> None:
    for name, one, other in zip(("y", "x", "weight", "bias"), fast, exact, strict=True):
        # y and the gradient of x are rounded to bfloat16's 8 bits; the sums are float32's.
        tolerance = {"y": 2**-8, "x": 2**-7, "weight": 1e-5, "bias": 1e-5}[name]
        assert (one.double() - other).norm() <= tolerance * other.norm(), name
        if name in ("y", "x"):
            assert (one.double() - other).abs().max() <= 2**-7 * other.abs().max(), name


@pytest.mark.skipif(platform.machine() != "x86_64", reason="which has such processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "skylake-avx512"])
def test_processors_that_know_less(processor, monkeypatch, tmp_path):
    """None of these, without AVX, with AVX2 and with AVX-512, has instructions for bfloat16 or matrix registers."""
    monkeypatch.setattr(kernels, "_FLAGS", [flag.replace("native", processor) for flag in kernels._FLAGS])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if processor == "skylake-avx512" and "avx512bw" not in kernels._processor():
        pytest.skip("this processor cannot run it")
    library = kernels.load.__wrapped__()
    assert not library.recurrent
    for rows, columns in SHAPES:
        check(*both(rows, columns, 2, library))


def test_extremes_do_not_overflow_and_nan_stays():
    x = torch.zeros(3, 16)
    x[0, :4] = torch.tensor([-1e18, 1e18, 0.0, 1.0])
    x[2, :3] = torch.tensor([float("nan"), 1.0, 2.0])
    x = x.bfloat16()
    weight, bias = torch.full((16,), 300.0), torch.zeros(16)
    y = kernels.load().norm_silu(x, weight, bias, EPS)
    assert y[:2].isfinite().all() and (y[1] == 0).all()
    assert (
        y[0, 0].abs() < 1e-30 and y[0, 1] > 400
    )  # silu of a large negative number is 0, of a large positive one itself
    assert y[2].isnan().all()


@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_image_distance_equals_torchs(focus, threads):
    """Of a random image, of one that is right in all but a sprite, and of one that is right everywhere."""
    torch.manual_seed(0)
    target = torch.rand(3, 64, 64, 3)
    drawn = torch.rand(3, 64, 64, 3)
    drawn[1:] = target[1:] = target[1:].bfloat16().float()
    drawn[1, 20:30, 40:45] += 0.3
    mean = tiles(drawn).bfloat16().contiguous()
    torch.set_num_threads(threads)
    found = []
    for dtype, library in ((torch.bfloat16, kernels.load()), (torch.float32, None)):
        leaf = mean.to(dtype).requires_grad_()
        error = ImageDistance.apply(leaf, tiles(target), focus, library)
        found.append((error, *torch.autograd.grad((error * torch.tensor([1.0, 2.0, 3.0])).sum(), leaf)))
    (fast, fast_gradient), (exact, gradient) = found
    torch.testing.assert_close(fast, exact, rtol=1e-5, atol=0)
    assert fast[2] == 0 and not fast_gradient[2].any()
    for one, other in zip(fast_gradient, gradient, strict=True):  # rounded twice to bfloat16's 8 bits
        assert (one.float() - other).norm() <= 2**-7 * other.norm()


def test_a_nan_in_an_image_is_in_its_distance():
    mean, target = torch.zeros(2, 32, 32, 2, 6).bfloat16(), torch.zeros(2, 64, 64, 3)
    mean[1, 3, 4, 0, 5] = float("nan")
    for focus in (0.0, 2.0):
        distance, weighted = kernels.load().image_distance(mean, target, focus)
        assert distance[0] == 0 and distance[1].isnan() and weighted[1].isnan().any()


def test_layouts_that_are_not_contiguous():
    x = torch.randn(2, 48, 5, 5).bfloat16().permute(0, 2, 3, 1).requires_grad_()
    weight, bias = torch.ones(48), torch.zeros(48)
    y = kernels.load().norm_silu(x, weight, bias, EPS)
    (gradient,) = torch.autograd.grad(y.sum(-1).permute(1, 2, 0).sum(), x)
    plain = F.silu(F.layer_norm(x.double(), (48,), eps=EPS))
    assert (y.double() - plain).abs().max() < 0.02
    assert (gradient.double() - torch.autograd.grad(plain.sum(), x)[0].double()).abs().max() < 0.02


@pytest.mark.parametrize("columns", [8, 24, 40])
def test_widths_that_are_not_whole_vectors_are_left_to_torch(columns):
    x, layer = torch.randn(5, columns).bfloat16(), NormSiLU(columns)
    layer.kernels = kernels.load()
    assert torch.equal(layer(x), F.silu(F.layer_norm(x.float(), (columns,), eps=EPS)).bfloat16())
    with pytest.raises(ValueError, match=f"{columns} columns"):
        kernels.load().norm_silu(x, layer.weight, layer.bias, EPS)


@pytest.mark.parametrize(
    "compiler, told", [("no-such-compiler", "finds none; install gcc"), ("false", "false cannot build dreamer/csrc")]
)
def test_a_compiler_that_is_missing_or_fails_is_told_in_one_line(compiler, told, tmp_path):
    code = "from dreamer import kernels, config\ntry: kernels.load()\nexcept config.ConfigError as error: print(error)"
    environment = {**os.environ, "CC": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told in done.stdout and done.stdout.count("\n") == 1
    assert not list(tmp_path.rglob("*.so"))
