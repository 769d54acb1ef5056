"""The recurrences in C against the RSSM in float32, and that they are used where they can be and nowhere else."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from agents import agent_config
from torch import Tensor

from dreamer import kernels, recurrence
from dreamer.actor_critic import ActorCritic
from dreamer.networks import NormSiLU, Sizes, State
from dreamer.rssm import RSSM

EMBED, ACTIONS = 24, 7
needs_registers = pytest.mark.skipif(not kernels.load().recurrent, reason="this processor has no matrix registers")


def models(**sizes: int) -> tuple[RSSM, ActorCritic]:
    """With kernels, and all weights away from where they begin."""
    torch.manual_seed(0)
    config = agent_config(model={"deter": 64, "hidden": 48, "stoch": 3, "classes": 16, "units": 32, **sizes})
    rssm = RSSM(config.model, EMBED, ACTIONS)
    actor_critic = ActorCritic(
        config.model, config.behavior, Sizes(config.model.stoch, config.model.classes, config.model.deter), ACTIONS
    )
    for parameter in (*rssm.parameters(), *actor_critic.actor.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in (*rssm.modules(), *actor_critic.modules()):
        if isinstance(module, NormSiLU | RSSM):
            module.kernels = kernels.load()
    return rssm, actor_critic


def mixed() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def variates_for_the_likeliest(rssm: RSSM, *inputs: Tensor) -> Tensor:
    """In the middle of what draws each step's most probable class, so that rounding does not change what is drawn."""
    batch, steps = inputs[2].shape
    uniform = torch.full((batch, steps, rssm.groups[0]), 0.5)
    for t in range(steps):
        probs = rssm.observe(*inputs, uniform)[1].probs.detach()[:, t].unflatten(-1, rssm.groups)
        likeliest = probs.argmax(-1, keepdim=True)
        uniform[:, t] = (probs.cumsum(-1) - probs / 2).gather(-1, likeliest).squeeze(-1)
    return uniform


@needs_registers
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch, classes, hidden", [(1, 16, 48), (5, 32, 48), (19, 16, 48), (5, 16, 320)])
def test_observe_is_as_near_to_float32_as_torch_in_bfloat16(batch, classes, hidden, threads):
    """States, and the gradients of all weights and of the embeddings, with episodes that begin within."""
    rssm, _ = models(classes=classes, hidden=hidden)
    steps = 5
    action = F.one_hot(torch.randint(0, ACTIONS, (batch, steps)), ACTIONS).float()
    is_first = torch.rand(batch, steps) < 0.2
    is_first[0, 2] = True
    before = State(torch.randint(0, classes, (batch, 3)), torch.tanh(torch.randn(batch, 64)))
    embed = torch.randn(batch, steps, EMBED)
    uniform = variates_for_the_likeliest(rssm, embed, action, is_first, before)
    towards = [torch.randn(batch, steps, size) for size in (3 * classes, 64, 3 * classes)]

    def run(precise: bool, fast: bool) -> list[Tensor]:
        leaf = embed.clone().requires_grad_()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=not precise),
            mock.patch.object(recurrence, "possible", recurrence.possible if fast else lambda rssm: False),
        ):
            logits, state = rssm.observe(leaf, action, is_first, before, uniform)
        found = [logits.flatten(2).float(), state.deter.float(), state.probs]
        assert state.deter.dtype == logits.dtype == (torch.float32 if precise else torch.bfloat16)
        loss = sum((one * other).sum() for one, other in zip(found, towards, strict=True))
        named = {name: each for name, each in rssm.named_parameters() if not name.startswith("prior")}
        gradients = torch.autograd.grad(loss, [leaf, *named.values()])
        indices.append(state.index)
        names[:] = ["logits", "deter", "probs", "embed", *named]
        return [*(each.detach() for each in found), *gradients]

    indices, names = [], []
    torch.set_num_threads(threads)
    exact, plain, fast = run(True, True), run(False, False), run(False, True)
    assert torch.equal(indices[0], indices[1]) and torch.equal(indices[0], indices[2])
    for name, one, torchs, ours in zip(names, exact, plain, fast, strict=True):
        off, allowed = ((each.float() - one).norm() / one.norm() for each in (ours, torchs))
        assert off <= 1.3 * allowed + 0.002 and off < 0.03, (name, off, allowed)


@needs_registers
@pytest.mark.parametrize("starts, classes", [(1, 16), (70, 32), (130, 16)])
def test_each_imagined_step_is_the_model_s_and_the_policy_s(starts, classes):
    """From where the kernel was: h within bfloat16's rounding, and every class and action the one that its variate
    draws, unless it lies within a hundredth of the next."""
    rssm, actor_critic = models(classes=classes)
    start = State(torch.randint(0, classes, (starts, 3)), torch.tanh(torch.randn(starts, 64)).bfloat16())
    uniform_action, uniform = torch.rand(6, starts), torch.rand(6, starts, 3)
    with mixed():
        states, action, logits = actor_critic.imagine(rssm, start, uniform_action, uniform, constant=True)
    assert states.index.shape == (7, starts, 3) and states.probs is None and states.deter.dtype == torch.bfloat16
    assert logits.requires_grad and not states.deter.requires_grad

    def draws(drawn: Tensor, probs: Tensor, variate: Tensor) -> bool:
        upper = probs.cumsum(-1).gather(-1, drawn[..., None]).squeeze(-1)
        lower = upper - probs.gather(-1, drawn[..., None]).squeeze(-1)
        return bool(((lower - 0.01 <= variate) & (variate <= upper + 0.01)).all())

    assert torch.equal(states.index[0], start.index) and torch.equal(states.deter[0], start.deter)
    differing = 0
    with torch.no_grad():
        for t in range(6):
            now = states.map(lambda part, t=t: part[t])._replace(deter=states.deter[t].float())
            policy = actor_critic.policy(now)
            assert draws(action[t].argmax(-1), policy.probs, uniform_action[t])
            assert (logits[t].float() - actor_critic.actor(now)).abs().max() < 0.05
            then = rssm.img_step(now, action[t], uniform[t])
            assert (states.deter[t + 1].float() - then.deter).abs().max() < 0.015
            probs = torch.lerp(rssm.prior(then.deter).softmax(-1), torch.tensor(1 / classes), rssm.config.unimix_ratio)
            assert draws(states.index[t + 1], probs, uniform[t])
            differing += int((states.index[t + 1] != then.index).sum())
    assert differing <= 0.02 * 6 * starts * 3


@needs_registers
def test_variates_draw_with_the_probabilities():
    """Of one state with a thousand variates each, the classes come as often as the model says."""
    rssm, actor_critic = models()
    steps = 2048
    start = State(torch.zeros(steps, 3, dtype=torch.long), torch.zeros(steps, 64).bfloat16())
    uniform = (torch.arange(steps) + 0.5)[:, None].expand(steps, 3) / steps
    with mixed():
        states, _, _ = actor_critic.imagine(rssm, start, torch.full((1, steps), 0.5), uniform[None], constant=True)
    found = F.one_hot(states.index[1], 16).float().mean(0)
    with torch.no_grad():
        probs = rssm.prior(states.deter[1, 0].float()).softmax(-1)
    torch.testing.assert_close(found, 0.99 * probs + 0.01 / 16, rtol=0.03, atol=2e-3)
    assert found.max() > 2 / 16  # so that this is no test of uniform draws alone


def test_float32_other_sizes_and_single_steps_are_left_to_torch():
    rssm, actor_critic = models()
    assert not recurrence.possible(rssm)  # no autocast
    with mixed():
        assert recurrence.possible(rssm, actor_critic.actor) == kernels.load().recurrent
        for sizes in ({"deter": 40}, {"hidden": 40}, {"classes": 8}):
            assert not recurrence.possible(models(**sizes)[0])
        assert not recurrence.possible(*(lambda pair: (pair[0], pair[1].actor))(models(units=40)))
        without = copy.deepcopy(rssm)
        without.kernels = None
        assert not recurrence.possible(without)
        with mock.patch.object(recurrence, "observe", side_effect=AssertionError):
            rssm.observe(torch.randn(2, 1, EMBED), torch.zeros(2, 1, ACTIONS), torch.ones(2, 1, dtype=torch.bool))


@needs_registers
def test_nan_is_not_hidden():
    """A model that has diverged is told from its losses, so NaN has to get there."""
    rssm, _ = models()
    embed = torch.randn(2, 3, EMBED)
    embed[0, 1, 0] = float("nan")
    with mixed():
        logits, state = rssm.observe(embed, torch.zeros(2, 3, ACTIONS), torch.zeros(2, 3, dtype=torch.bool))
    assert logits[0, 1].isnan().all() and not logits[1].isnan().any() and not logits[0, 0].isnan().any()
    assert state.probs[0, 1].isnan().all() and (state.index >= 0).all() and (state.index < 16).all()
