"""Gradient steps on real networks."""

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


@pytest.mark.parametrize(
    ("decay", "scales"), [(0.0, (1, 1, 1, 1)), (0.25, (1, 1, 0.55, 0.1)), (1.0, (1, 0.55, 0.2125, 0.1))]
)
def test_all_learning_rates_fall_to_a_tenth_over_the_last_share_of_training(decay: float, scales: tuple[float, ...]):
    """Adam's first step is the learning rate whatever the gradient's size, so it tells what the rate is."""
    for done, scale in zip((0.0, 0.5, 0.875, 1.0), scales, strict=True):
        agent = small_agent(optimizers={"lr_decay": decay})
        agent.anneal(done)
        for name, optimizer in agent.optimizers.items():
            before = [parameter.detach().clone() for parameter in optimizer.parameters]
            optimizer.step([torch.full_like(parameter, 1e-3) for parameter in before])
            step = scale * getattr(agent.config.optimizers, name).lr
            for old, new in zip(before, optimizer.parameters, strict=True):
                torch.testing.assert_close(old - new, torch.full_like(old, step), rtol=0.01, atol=2e-7)


def test_a_loaded_optimizer_steps_at_its_own_learning_rate():
    """So a training that goes on with another rate has it, and what falls with time falls on after it was stopped."""
    one, two = small_agent(), small_agent(optimizers={"actor": {"lr": 1e-2, "eps": 1e-8, "grad_clip": 100.0}})
    one, two = one.optimizers["actor"], two.optimizers["actor"]
    two.load_state_dict(one.state_dict())
    two.scale_lr(0.5)
    before = [parameter.detach().clone() for parameter in two.parameters]
    two.step([torch.full_like(parameter, 1e-3) for parameter in before])
    for old, new in zip(before, two.parameters, strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, 5e-3), rtol=0.01, atol=2e-7)
