"""One product where a module multiplies the same input by several weights: Q, K and V; gate and up; and others alike.

A decode step reads every weight for a handful of tokens, and a GPU reads one long matrix faster than three short ones.
So the weights that meet the same input lie one behind another in one tensor, and each projection's own weight is a view
of its rows:

    q_proj.weight [12, 8] |
    k_proj.weight  [4, 8] | rows 0-12, 12-16 and 16-20 of one weight [20, 8]; x @ weight.T is [1, T, 20]
    v_proj.weight  [4, 8] |

The projection that is called first computes the product, each takes its columns, and the last lets go of it. The
model's code calls its projections as ever and knows nothing of it. In a compiled layer the passing on is gone once the
compiler has traced it: what is left is one product and its slices.

Numbers: a column of the product is the sum of the same terms as before, but a library may add them in another order for
a longer matrix. So tokens and state_dict stay, and values agree within rounding: for weight rows w and in_features K,
|difference| <= 2 K eps |x| . |w|.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from paged.model.paged_attention import PROBE


class SharedProduct(nn.Module):
    """The weights of projections of one input, one behind another, and the product while it is being read.

    Attributes:
        weight: [sum of out_features, in_features]; the projections' weights are views of it.
        bias: [sum of out_features], or None.
        input, output: between the first and the last projection of a forward pass, the input and its product
            [..., sum of out_features]; else None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        # Buffers, since the compiler takes the shapes of a module's tensors as fixed; not saved, since the projections'
        # weights are.
        self.register_buffer("weight", _lay_together([linear.weight for linear in linears]), persistent=False)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.register_buffer("bias", _lay_together(biases) if biases else None, persistent=False)
        self.input: Tensor | None = None
        self.output: Tensor | None = None


def _lay_together(parameters: Sequence[Tensor]) -> Tensor:
    """Move parameters into one new tensor, along the first axis. Each one's own memory is free as soon as it moved."""
    first = parameters[0]
    rows = [parameter.shape[0] for parameter in parameters]
    together = torch.empty((sum(rows), *first.shape[1:]), dtype=first.dtype, device=first.device)
    for parameter, place in zip(parameters, torch.split(together, rows), strict=True):
        place.copy_(parameter.data)
        parameter.data = place
    return together


class Projection(nn.Linear):
    """A linear layer that takes its columns from a product with its neighbours.

    Args:
        linear: what it stands for; its parameters become this module's.
        product: what it shares.
        start: its first column.
        is_first, is_last: its place in the order of calls.
    """

    def __init__(self, linear: nn.Linear, product: SharedProduct, start: int, *, is_first: bool, is_last: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.product = product
        self.start, self.end = start, start + linear.out_features
        self.is_first, self.is_last = is_first, is_last
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], a view of the product."""
        product = self.product
        # The first one never trusts what it finds: a pass that broke off may have left its product behind, of a tensor
        # that has been filled anew since. The others look whether it is theirs, so that no order of calls is wrong.
        if self.is_first or product.input is not input:
            product.input, product.output = input, F.linear(input, product.weight, product.bias)
        assert product.output is not None, "set together with the input"
        part = product.output[..., self.start : self.end]
        if self.is_last:
            product.input = product.output = None
        return part


@torch.inference_mode(False)  # whatever the caller's mode: tensors made in inference mode have no versions
@torch.no_grad()
def fuse_projections(model: PreTrainedModel) -> int:
    """Compute projections of the same input in one product, wherever the model has them.

    The weights take the bytes they took, and while they move, those of one product more. Moving the model to another
    device or dtype afterwards would tear the views from their tensor and double the weights, so do that before.

    Args:
        model: one whose attention `find_attention` has found fit.

    Returns:
        Products saved in each forward pass: 3 a layer for Llama (Q, K, V and gate, up), 0 for a model that comes with
        fused weights, as Phi-3.
    """
    saved = 0
    for parent, linears in _projections_of_one_input(model):
        product = SharedProduct(list(linears.values()))
        last, start = list(linears)[-1], 0
        for name, linear in linears.items():
            setattr(parent, name, Projection(linear, product, start, is_first=start == 0, is_last=name == last))
            start += linear.out_features
        saved += len(linears) - 1
    return saved


def _projections_of_one_input(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Ask the model itself which children of one module read the same tensor: run a token, and take notes.

    Returns:
        Modules with such children, two or more, by name and in the order in which they were called.
    """
    parents = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    fit = _fit_to_move(model)
    calls: list[tuple[nn.Linear, Tensor, int]] = []

    def note(linear: nn.Linear, arguments: tuple[Any, ...]) -> None:
        if arguments:  # not handed on by keyword
            # With its version: a tensor that was changed in place is another input.
            calls.append((linear, arguments[0], arguments[0]._version))

    hooks = [linear.register_forward_pre_hook(note) for linear in fit]
    attention = model.config._attn_implementation
    model.set_attn_implementation(PROBE)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        model(input_ids=zero, position_ids=zero, use_cache=False, calls=[])
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()

    times = Counter(linear for linear, _, _ in calls)
    groups: dict[tuple[Any, ...], dict[str, nn.Linear]] = defaultdict(dict)
    for linear, x, version in calls:
        if times[linear] == 1:
            parent, name = parents[linear]
            # `calls` keeps x, so no other tensor has its id. One input means one width, dtype and device.
            groups[parent, id(x), version, linear.bias is None][name] = linear
    return [(key[0], linears) for key, linears in groups.items() if len(linears) > 1]


def _fit_to_move(model: PreTrainedModel) -> list[nn.Linear]:
    """Linear layers whose weights can lie elsewhere without anybody noticing."""
    modules = list(model.modules())
    held = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    # A quantised weight may be a tensor class of its own, which has no storage to ask for; it is not moved.
    plain = [tensor for tensor in held if type(tensor) in (Tensor, nn.Parameter)]
    holders = Counter(tensor.untyped_storage().data_ptr() for tensor in plain)

    def can_move(tensor: Tensor | None) -> bool:
        return type(tensor) is nn.Parameter and holders[tensor.untyped_storage().data_ptr()] == 1

    return [
        module
        for module in modules
        if type(module) is nn.Linear  # a quantised or parametrised one is of another class
        and can_move(module.weight)
        and (module.bias is None or can_move(module.bias))
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    ]
