"""What an image that was drawn costs: pixels, chunks and precision."""

import pytest
import torch
from agents import small_agent

from dreamer.image_loss import ImageDistance, image_loss
from dreamer.networks import State, tiles, untiled


@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
def test_pixels_weigh_as_their_error_to_a_power(focus):
    """Against a plain sum with its weights as constants, by autograd in float64; a black image is no error at all."""
    torch.manual_seed(0)
    mean, target = torch.rand(3, 32, 32, 2, 6), torch.rand(3, 32, 32, 2, 6)
    target[2] = mean[2]
    mean.requires_grad_()
    error = ImageDistance.apply(mean, target, focus)
    factors = torch.tensor([1.0, 2.0, 3.0])
    (gradient,) = torch.autograd.grad((factors * error).sum(), mean)

    plain = untiled(mean.detach()).double().requires_grad_()
    squares = (plain - untiled(target).double()).square().sum(-1)  # (3, 64, 64), of a pixel's three channels
    weights = squares.detach().sqrt() ** focus
    whole, weighted = squares.sum((1, 2)), (weights * squares).sum((1, 2))
    unit = torch.where(whole > 0, whole / weighted, 0.0).detach()
    (exact,) = torch.autograd.grad((factors * unit * weighted).sum(), plain)
    torch.testing.assert_close(error.detach(), whole.detach().float())
    torch.testing.assert_close(untiled(gradient), exact.float(), rtol=1e-4, atol=1e-7)
    assert error[2] == 0 and not gradient[2].any()


@pytest.mark.parametrize("chunk", [1, 4, 10, None])
def test_images_drawn_in_chunks_have_the_gradients_of_all_at_once(chunk):
    """In float32, of ten states: of the decoder's weights and of both parts of the state, times what comes after."""
    torch.manual_seed(0)
    model = small_agent().world_model
    logits = torch.randn(10, model.sizes.stoch, model.sizes.classes)
    index, target = logits.argmax(-1), torch.rand(10, 32, 32, 2, 6) - 0.5
    inputs = torch.randn(10, model.sizes.deter, requires_grad=True), logits.softmax(-1).flatten(1).requires_grad_()
    asked = [*inputs, *model.decoder.parameters()]
    plain = ImageDistance.apply(model.decoder(State(index, *inputs)), target, 2.0).mean()
    exact = torch.autograd.grad(3 * plain, asked)
    loss = image_loss(model.decoder, State(index, *inputs), target, 2.0, chunk)
    found = torch.autograd.grad(3 * loss, asked)
    torch.testing.assert_close(loss, plain)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(image_loss(model.decoder, State(index, *inputs), target, 2.0, chunk), plain)


def test_an_images_error_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    mean, target = torch.rand(3, 32, 32, 2, 6).bfloat16(), torch.rand(3, 32, 32, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        error = ImageDistance.apply(mean, target, 2.0)
    exact = (mean.double() - target.double()).square().flatten(1).sum(1)
    torch.testing.assert_close(error, exact.float())


def test_focus_gives_a_sprite_its_share_of_the_gradient():
    """12 pixels off by 0.3 among 4,084 off by 0.02: 40% of the squared error, but 99% of what focus 2 looks at."""
    target = torch.zeros(1, 64, 64, 3)
    mean = torch.full_like(target, 0.02)
    mean[0, 30:34, 20:23] = 0.3
    mean, target = tiles(mean).contiguous().requires_grad_(), tiles(target)
    shares = []
    for focus in (0.0, 2.0):
        (gradient,) = torch.autograd.grad(ImageDistance.apply(mean, target, focus).sum(), mean)
        per_pixel = (untiled(gradient)[0] * untiled(mean.detach())[0]).sum(-1)
        shares.append(float(per_pixel[30:34, 20:23].sum() / per_pixel.sum()))
    assert shares == pytest.approx([0.398, 0.9934], abs=1e-3)
