"""The fast ways to multiply equal the plain ones, values and gradients."""

import torch
import torch.nn.functional as F
from agents import small_agent
from torch import Tensor

from dreamer.distributions import OneHot
from dreamer.networks import State
from dreamer.rssm import RSSM
from dreamer.unrolled import Unrolled, one_hot_product


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_sum_of_rows_is_the_product_with_one_hots():
    weight, probs, index = double(5 * 4, 3), double(6, 20), torch.randint(4, (6, 5))
    one_hot = F.one_hot(index, 4).flatten(-2).double().requires_grad_()
    fast, plain = one_hot_product(weight, index, probs), one_hot @ weight
    torch.testing.assert_close(fast, plain)
    output_gradient = double(6, 3, seed=1).detach()
    fast_gradients = torch.autograd.grad(fast, (weight, probs), output_gradient)
    torch.testing.assert_close(fast_gradients, torch.autograd.grad(plain, (weight, one_hot), output_gradient))


def test_one_gradient_for_all_steps_is_the_sum_of_each_steps():
    weight, known, start = double(4, 4), double(3, 2, 4, seed=1), double(2, 4, seed=2)

    def run(product) -> Tensor:
        x = start
        for t in range(3):
            x = torch.tanh(product(t, x))
        return x.sum()

    late = Unrolled(weight, known)
    fast = run(lambda t, x: late(x))
    plain = run(lambda t, x: known[t] + x @ weight)
    torch.testing.assert_close(fast, plain)
    inputs = (weight, known, start)
    torch.testing.assert_close(torch.autograd.grad(fast, inputs), torch.autograd.grad(plain, inputs))


def plain_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, 1e-3))


def plain_observe(rssm: RSSM, embed: Tensor, action: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, ...]:
    """Section 2.2 as it is written, with one-hot vectors and nothing taken out of the loop."""
    uniform = torch.rand(*is_first.shape, rssm.groups[0])
    first_stoch, first_deter = rssm.initial()
    stoch, deter = F.one_hot(state.index, rssm.groups[1]).flatten(-2).to(embed.dtype), state.deter
    posts, stochs, deters = [], [], []
    for t in range(is_first.shape[1]):
        first = is_first[:, t, None]
        stoch, deter = torch.where(first, first_stoch, stoch), torch.where(first, first_deter, deter)
        past = torch.cat([stoch, action[:, t] * ~first], -1)
        x = plain_norm(rssm.input_norm, past @ torch.cat([rssm.input.stoch, rssm.input.rest.t()]))
        deter = rssm.cell(x, deter)
        both = torch.cat([deter, embed[:, t]], -1)
        hidden = F.linear(both, torch.cat([rssm.post_deter.weight, rssm.post_embed.weight], -1))
        logits = rssm.post_out(plain_norm(rssm.post_norm, hidden)).unflatten(-1, rssm.groups)
        z = OneHot(logits, rssm.config.unimix_ratio)
        one_hot = F.one_hot(z.draw(uniform[:, t]), rssm.groups[1])
        stoch = (one_hot + z.probs - z.probs.detach()).flatten(-2)
        posts.append(logits), stochs.append(stoch), deters.append(deter)
    return torch.stack(posts, 1), torch.stack(stochs, 1), torch.stack(deters, 1)


def test_observing_equals_the_plain_recurrence():
    torch.manual_seed(0)
    rssm = small_agent().world_model.rssm.double()
    batch, length = 3, 7
    embed = double(batch, length, rssm.post_embed.in_features)
    action = F.one_hot(torch.randint(7, (batch, length)), 7).double()
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    is_first[0, 0] = is_first[1, 3] = True
    start = State(torch.randint(8, (batch, 8)), double(batch, 64).detach().tanh())
    read = double(8 * 8, 5)

    torch.manual_seed(1)
    post, states = rssm.observe(embed, action, is_first, start)
    z = one_hot_product(read, states.index.flatten(0, 1), states.probs.flatten(0, 1)).view(batch, length, -1)
    torch.manual_seed(1)
    plain_post, stoch, deter = plain_observe(rssm, embed, action, is_first, start)
    torch.testing.assert_close((post, z, states.deter), (plain_post, stoch @ read, deter))

    weights = [double(*part.shape, seed=i) for i, part in enumerate((post, z, deter))]
    losses = [
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))
        for parts in ((post, z, states.deter), (plain_post, stoch @ read, deter))
    ]
    inputs = {name: value for name, value in rssm.named_parameters() if not name.startswith("prior_layers")}
    found = [torch.autograd.grad(loss, [*inputs.values(), embed, read]) for loss in losses]
    for name, fast, plain in zip([*inputs, "embed", "read"], *found, strict=True):
        torch.testing.assert_close(fast, plain, msg=lambda text, name=name: f"{name}: {text}")


def test_a_head_equals_its_dense_products():
    torch.manual_seed(0)
    model = small_agent().world_model
    state = State(torch.randint(8, (4, 8)), torch.randn(4, 64).tanh())
    dense = torch.cat([F.one_hot(state.index, 8).flatten(-2).float(), state.deter], -1)
    head = model.continue_head
    x = plain_norm(head.norm, F.linear(dense, torch.cat([head.input.stoch.t(), head.input.rest], -1)))
    torch.testing.assert_close(head(state), head.output(head.hidden(x)))
