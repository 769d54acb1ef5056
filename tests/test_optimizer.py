"""Steps of Adam and Muon on real networks."""

import pytest
import torch
from agents import small_agent


def test_gradients_are_clipped_by_global_norm():
    agent = small_agent(optimizers={"model": {"lr": 1e-3, "eps": 1e-8, "grad_clip": 0.5}})
    optimizer = agent.optimizers["model"]
    gradients = [100 * parameter.detach() for parameter in optimizer.parameters]
    norm = optimizer.step([gradient.clone() for gradient in gradients])
    exact = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
    torch.testing.assert_close(norm, exact)
    assert norm > 0.5
    # Adam's first moment is a tenth of the first gradient it is given.
    given = torch.stack([moments["exp_avg"].norm() for moments in optimizer.adam.state.values()]) * 10
    assert torch.linalg.vector_norm(given).item() == pytest.approx(0.5, rel=1e-3)


def test_gradients_reach_the_weights_however_they_lie_in_memory():
    agent = small_agent()
    optimizer = agent.optimizers["critic"]
    before = [parameter.detach().clone() for parameter in optimizer.parameters]
    gradients = [torch.randn_like(parameter) for parameter in before]
    turned = [gradient.T.contiguous().T if gradient.ndim == 2 else gradient.clone() for gradient in gradients]
    assert any(one.stride() != other.stride() for one, other in zip(gradients, turned, strict=True))
    optimizer.step(turned)
    for old, new, gradient in zip(before, optimizer.parameters, gradients, strict=True):
        assert torch.equal((old - new).sign(), gradient.sign())


def test_muon_turns_the_image_matrices_alike_in_all_directions():
    """In the gradient's own singular vectors an update is diagonal, with values near one where Adam's would differ; the
    weights that nobody named to it move as Adam moves them."""
    torch.manual_seed(0)
    agent = small_agent(optimizers={"muon_lr": 0.01})
    optimizer, named = agent.optimizers["model"], agent.learner.image_matrices()
    names = {id(parameter): name for name, parameter in agent.learner.named_parameters()}
    before = [parameter.detach().clone() for parameter in optimizer.parameters]
    gradients = [1e-3 * torch.randn_like(parameter) for parameter in before]
    optimizer.step([gradient.clone() for gradient in gradients])
    moved = {
        id(parameter): (old - parameter.detach(), gradient)
        for old, parameter, gradient in zip(before, optimizer.parameters, gradients, strict=True)
    }
    for weight, rows in named:
        for change, gradient in zip(*(part.flatten(1).split(rows) for part in moved.pop(id(weight))), strict=True):
            scale = 0.01 * 0.2 * max(change.shape) ** 0.5
            left, values, right = torch.linalg.svd(gradient, full_matrices=False)
            turned = left.T @ change @ right.T / scale
            strong = values > 0.3 * values[0]
            name = names[id(weight)]
            assert turned.diagonal()[strong].min() > 0.4 and turned.diagonal().max() < 1.4, name
            assert (turned - torch.diag(turned.diagonal())).abs().max() < 0.05, name
    for change, gradient in moved.values():
        torch.testing.assert_close(change, 1e-3 * gradient / (gradient.abs() + 1e-8), rtol=1e-3, atol=1e-7)


def test_muon_has_what_lies_between_image_and_state_and_nothing_of_the_dynamics():
    model = small_agent().world_model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(weight)] for weight, _ in model.image_matrices()}
    assert found == {
        *(f"encoder.layers.{layer}.weight" for layer in (2, 4, 6)),
        *(f"rssm.{name}.weight" for name in ("post_deter", "post_embed", "post_out")),
        *("decoder.linear.stoch", "decoder.linear.rest"),
        *(f"decoder.layers.{layer}.weight" for layer in (0, 2, 4)),
    }
    assert {rows for weight, rows in model.image_matrices() if len(weight) != rows} == {model.sizes.classes}
