"""The RSSM's recurrences on a CPU with matrix registers, in bfloat16: `csrc/recurrence.c`.

Torch takes longer to start the operations of a step than the processor to do them. Products round their factors to
bfloat16 and sum in float32, as torch's do; the rest is float32, and rounds less often than torch does under autocast.
"""

import ctypes
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.kernels import UNIT
from dreamer.unrolled import compute_dtype, flat_one_hot

if TYPE_CHECKING:
    from dreamer.networks import MLP, State
    from dreamer.rssm import RSSM

_BLOCK = 16  # rows for which there is one sum of the norms' gradients
_LAYERS = 8  # of a policy, at most

_Pointer, _Integer, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Norm(ctypes.Structure):
    _fields_ = [("scale", _Pointer), ("shift", _Pointer)]


class _Layer(ctypes.Structure):
    _fields_ = [("weight", _Pointer), ("norm", _Norm)]


class _Observe(ctypes.Structure):
    _fields_ = [
        *((name, _Integer) for name in ("batch", "steps", "stoch", "classes", "deter", "hidden")),
        *((name, _Float) for name in ("unimix", "eps")),
        *(("table", _Pointer), ("input_norm", _Norm), ("gates", _Pointer), ("gates_norm", _Norm)),
        *(("post", _Pointer), ("post_norm", _Norm), ("out", _Pointer), ("bias", _Pointer)),
        *((name, _Pointer) for name in ("first_x", "first_h", "is_first", "index_before", "deter_before")),
    ]


class _Observed(ctypes.Structure):
    _names = ("index", "deter", "probs", "logits", "x", "xh", "products", "h", "pre", "post")
    _fields_ = [(name, _Pointer) for name in _names]


class _Gradient(ctypes.Structure):
    _names = ("logits", "pre", "products", "x", "input_norm", "gates_norm", "post_norm", "first_h")
    _fields_ = [(name, _Pointer) for name in _names]


class _Imagine(ctypes.Structure):
    _names = ("starts", "steps", "stoch", "classes", "deter", "hidden", "actions", "units", "layers")
    _fields_ = [
        *((name, _Integer) for name in _names),
        *((name, _Float) for name in ("unimix", "policy_unimix", "eps")),
        *(("table", _Pointer), ("of_action", _Pointer), ("input_norm", _Norm), ("gates", _Pointer)),
        *(("gates_norm", _Norm), ("prior", _Layer), ("out", _Pointer), ("bias", _Pointer)),
        *(
            ("policy_table", _Pointer),
            ("policy", _Layer * _LAYERS),
            ("policy_out", _Pointer),
            ("policy_bias", _Pointer),
        ),
    ]


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _norm(scale: Tensor, shift: Tensor) -> _Norm:
    return _Norm(_at(scale), _at(shift))


def _layer(linear: nn.Linear, norm: nn.LayerNorm) -> _Layer:
    return _Layer(_at(linear.weight), _norm(norm.weight, norm.bias))


def possible(rssm: "RSSM", policy: "MLP | None" = None) -> bool:
    """Whether the kernels are wanted, this processor has what they need, and the sizes suit them."""
    if rssm.kernels is None or not rssm.kernels.recurrent or compute_dtype(rssm.post_out.weight) != torch.bfloat16:
        return False
    sizes = [rssm.config.deter, rssm.config.hidden, rssm.config.classes]
    if policy is not None:
        sizes.append(policy.output.in_features)
        if len(policy.hidden) >= _LAYERS:
            return False
    return all(size % UNIT == 0 for size in sizes)


def observe(
    rssm: "RSSM", known_x: Tensor, known_post: Tensor, is_first: Tensor, state: "State", uniform: Tensor
) -> tuple[Tensor, "State"]:
    """`RSSM.observe`, from the shares of its two first layers that are known before the recurrence runs.

    Args:
        known_x: (B, T, hidden), of the actions
        known_post: (B, T, hidden), of the embeddings
        is_first: (B, T) bool
        state: before the first step, (B, ...), a constant
        uniform: (B, T, S)
    """
    stoch, first_h = rssm.initial()
    layers = (
        *(rssm.input.stoch, rssm.input_norm.weight, rssm.input_norm.bias),
        *(rssm.cell.linear.weight, rssm.cell.norm.weight, rssm.cell.norm.bias),
        *(rssm.post_deter.weight, rssm.post_norm.weight, rssm.post_norm.bias),
        *(rssm.post_out.weight, rssm.post_out.bias),
    )
    first = (stoch @ rssm.input.stoch).float(), first_h
    known = known_x.bfloat16(), known_post.bfloat16()
    constants = is_first, state.index, state.deter.detach().float(), uniform
    logits, index, deter, probs = _Observation.apply(rssm, *constants, *known, *first, *layers)
    return logits.unflatten(-1, rssm.groups), state._replace(
        index=index, deter=deter, probs=probs if probs.requires_grad else None
    )


class _Observation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        rssm: "RSSM",
        is_first: Tensor,
        index_before: Tensor,
        deter_before: Tensor,
        uniform: Tensor,
        *differentiable: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        differentiable = [tensor.contiguous() for tensor in differentiable]
        constants = [tensor.contiguous() for tensor in (is_first, index_before, deter_before)]
        config, (batch, steps) = rssm.config, is_first.shape
        classes, hidden, deter = config.stoch * config.classes, config.hidden, config.deter
        half = lambda size: torch.empty(batch, steps, size, dtype=torch.bfloat16)  # noqa: E731
        found = [
            *(torch.empty(batch, steps, config.stoch, dtype=torch.long), torch.empty(batch, steps, deter)),
            *(torch.empty(batch, steps, classes), half(classes), half(hidden), half(hidden + deter)),
            *(half(3 * deter), half(deter), half(hidden), half(hidden)),
        ]
        ctx.kernels, ctx.config, ctx.eps = rssm.kernels, config, rssm.cell.norm.eps
        known, uniform = differentiable[:2], uniform.contiguous()
        arguments = (
            _sequences(ctx, constants, differentiable),
            *map(_at, (*known, uniform)),
            _Observed(*map(_at, found)),
        )
        _call(ctx.kernels.library.observe, *arguments)
        ctx.save_for_backward(*constants, *differentiable, *found)
        index, probs, logits, h = found[0], found[2], found[3], found[7]
        ctx.mark_non_differentiable(index)
        return logits, index, h, probs

    @staticmethod
    def backward(ctx, logits: Tensor, _: None, h: Tensor, probs: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(_Observed._names)
        constants, differentiable, found = saved[:3], saved[3:-count], saved[-count:]
        (is_first, index_before, _), config = constants, ctx.config
        index, xh, state, post = (found[_Observed._names.index(name)] for name in ("index", "xh", "h", "post"))
        blocks, hidden, deter = -(-len(index) // _BLOCK), config.hidden, config.deter
        given = [tensor.float().contiguous() for tensor in (logits, probs, h)]
        like = (found[_Observed._names.index(name)] for name in ("logits", "pre", "products", "x"))
        products = [torch.empty_like(tensor) for tensor in like]
        sums = [torch.zeros(blocks, 2, size) for size in (hidden, 3 * deter, hidden)] + [torch.zeros(blocks, deter)]
        _call(
            ctx.kernels.library.observe_back,
            *(_sequences(ctx, constants, differentiable), _Observed(*map(_at, found))),
            *(*map(_at, given), _Gradient(*map(_at, products + sums))),
        )
        of_logits, of_pre, of_gates, of_x = (tensor.flatten(0, 1) for tensor in products)
        input_norm, gates_norm, post_norm, first_h = (tensor.sum(0) for tensor in sums)
        begins = is_first.flatten()
        going_on = of_x.masked_fill(begins[:, None], 0)
        chosen = torch.cat([index_before[:, None], index[:, :-1]], 1).flatten(0, 1)
        one_hot = flat_one_hot(chosen, config.classes, of_x.dtype)

        def weight(left: Tensor, right: Tensor) -> Tensor:
            return (left.t() @ right.flatten(0, -2)).float()

        return (
            *(None,) * 5,
            *(going_on.view_as(products[3]), products[1]),
            *(of_x[begins].float().sum(0), first_h),
            *(weight(one_hot, going_on), *input_norm, weight(of_gates, xh), *gates_norm),
            *(weight(of_pre, state), *post_norm, weight(of_logits, post), of_logits.float().sum(0)),
        )


def _sequences(ctx, constants: list[Tensor], differentiable: list[Tensor]) -> _Observe:
    (batch, steps), config = constants[0].shape, ctx.config
    first_x, first_h, table, *layers, post_out, bias = differentiable[2:]
    input_scale, input_shift, gates, gates_scale, gates_shift, post, post_scale, post_shift = layers
    sizes = batch, steps, config.stoch, config.classes, config.deter, config.hidden, config.unimix_ratio, ctx.eps
    return _Observe(
        *(*sizes, _at(table), _norm(input_scale, input_shift), _at(gates), _norm(gates_scale, gates_shift), _at(post)),
        *(_norm(post_scale, post_shift), *map(_at, (post_out, bias, first_x, first_h, *constants))),
    )


@torch.no_grad()
def imagine(
    rssm: "RSSM",
    policy: "MLP",
    unimix: float,
    start: "State",
    uniform_action: Tensor,
    uniform_state: Tensor,
) -> tuple["State", Tensor]:
    """What follows from N states if the policy, mixed with chance by `unimix`, decides.

    Args:
        start: (N, ...)
        uniform_action, uniform_state: variates to draw with, (H, N) and (H, N, S)

    Returns:
        states s_0 to s_H, (H + 1, N, ...), and actions a_0 to a_{H-1}, (H, N, A)
    """
    (steps, starts), config = uniform_action.shape, rssm.config
    index = torch.empty(steps + 1, starts, config.stoch, dtype=torch.long)
    deter = torch.empty(steps + 1, starts, config.deter, dtype=torch.bfloat16)
    action = torch.empty(steps, starts, dtype=torch.long)
    index[0], deter[0] = start.index, start.deter
    of_action = rssm.input.rest.t().contiguous()
    variates = uniform_action.t().contiguous(), uniform_state.transpose(0, 1).contiguous()
    (prior, prior_norm), out = rssm.prior_layers
    layers = [_Layer(_at(policy.input.rest), _norm(policy.norm.weight, policy.norm.bias))]
    layers += [_layer(linear, norm) for linear, norm in policy.hidden]
    sizes = starts, steps, config.stoch, config.classes, config.deter, config.hidden, len(of_action)
    arguments = _Imagine(
        *(*sizes, policy.output.in_features, len(layers), config.unimix_ratio, unimix, rssm.cell.norm.eps),
        *(_at(rssm.input.stoch), _at(of_action), _norm(rssm.input_norm.weight, rssm.input_norm.bias)),
        *(_at(rssm.cell.linear.weight), _norm(rssm.cell.norm.weight, rssm.cell.norm.bias), _layer(prior, prior_norm)),
        *(_at(out.weight), _at(out.bias), _at(policy.input.stoch), (_Layer * _LAYERS)(*layers)),
        *(_at(policy.output.weight), _at(policy.output.bias)),
    )
    _call(rssm.kernels.library.imagine, arguments, *map(_at, (*variates, index, deter, action)))
    return start._replace(index=index, deter=deter, probs=None), F.one_hot(action, len(of_action)).float()


def _call(function, *arguments: ctypes.Structure | int) -> None:
    passed = [_Pointer(each) if isinstance(each, int) else ctypes.byref(each) for each in arguments]
    function(*passed, torch.get_num_threads())
