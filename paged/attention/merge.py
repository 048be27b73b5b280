"""Attention over parts of a context, put together: what split contexts, chunks and shared prefixes are built on.

Softmax over all keys is a weighted mean of the softmaxes over parts of them, and the log-sum-exp of each part says how
much it weighs (Milakov and Gimelshein 2018; FlashAttention and Flash-Decoding use the same identity):

    out = sum_i exp(lse_i - lse) * out_i        lse = log sum_i exp(lse_i)

A sink is a logit in the denominator of the whole, so it comes once, after all parts.
"""

from functools import reduce

import torch
from torch import Tensor


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Put together attention over S disjoint parts of the keys.

    Args:
        outs: [..., S, H, Dv], the output over each part; whatever it holds where a part has no key.
        lses: [..., S, H], natural log; -inf where a part has no key.

    Returns:
        out [..., H, Dv] in outs' dtype, lse [..., H] in lses' dtype. Where no part has a key: 0 and -inf.

    Example: two parts of one key each, with scores 0 and log 3.
        >>> outs, lses = torch.tensor([[[4.0]], [[8.0]]]), torch.tensor([[1.0], [3.0]]).log()
        >>> out, lse = merge_parts(outs, lses)
        >>> out.item(), round(lse.exp().item(), 4)
        (7.0, 4.0)
    """
    return merge_outs(outs, lses), lses.logsumexp(dim=-2)


def merge_outs(outs: Tensor, lses: Tensor) -> Tensor:
    """The same without the log-sum-exp, which only sinks and further merges ask for: out [..., H, Dv]."""
    # Part by part, and each number of the output finds its weights for itself: then all of it is arithmetic on numbers
    # at the same place, of which the compiler makes one kernel, and kernels are what a small batch waits for.
    lse_of_parts = lses[..., None].expand(outs.shape).unbind(-3)  # S times [..., H, Dv]
    largest = reduce(torch.maximum, lse_of_parts)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    out = total = torch.zeros_like(largest)
    for part, lse in zip(outs.unbind(-3), lse_of_parts, strict=True):
        weight = torch.exp(lse - largest)
        total = total + weight
        out = out + torch.where(weight > 0, weight * part, 0.0)  # where a part has no key it may hold NaN
    return (out / torch.where(total == 0, 1.0, total)).to(outs.dtype)


def merge_two(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Put together attention over two disjoint parts of the keys, each where it lies.

    Args:
        out, other_out: [..., H, Dv].
        lse, other_lse: [..., H].

    Returns:
        out [..., H, Dv], lse [..., H]. Where neither part has a key: 0 and -inf.
    """
    largest = torch.maximum(lse, other_lse)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weight, other_weight = torch.exp(lse - largest)[..., None], torch.exp(other_lse - largest)[..., None]
    total = weight + other_weight
    first = torch.where(weight == 0, 0.0, weight * out.to(lse.dtype))
    second = torch.where(other_weight == 0, 0.0, other_weight * other_out.to(lse.dtype))
    merged = (first + second) / torch.where(total == 0, 1.0, total)
    return merged.to(out.dtype), largest + total[..., 0].log()


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What the output is with one more logit in each head's denominator that no value belongs to.

    Args:
        out: [T, H, Dv], over the keys alone.
        lse: [T, H], over the keys alone.
        sinks: [H].

    Returns:
        [T, H, Dv]: `out * exp(lse) / (exp(lse) + exp(sink))`.

    Example: one key of score 0 and a sink of 0: half.
        >>> apply_sinks(torch.ones(1, 1, 1), torch.zeros(1, 1), torch.zeros(1)).item()
        0.5
    """
    share = torch.exp(lse - torch.logaddexp(lse, sinks.to(lse.dtype)))  # [T, H]
    share = torch.where(lse == -torch.inf, 0.0, share)
    return (out * share[..., None]).to(out.dtype)
