"""Multi-head latent attention: one vector for each token that is its key, and whose first part is its value.

The layout (`to_latent`, `from_latent`, `latent_query`, `from_latent_out`) and the adapter for its kernels (`Latent`).
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from paged.oracle.adapters.foreign import NO_ARGUMENT, Foreign, call_unwritten, spaced
from paged.oracle.declarations import Capabilities
from paged.oracle.guard import Mishap
from paged.oracle.inputs import Inputs


def to_latent(key_cache: Tensor, value_cache: Tensor, rope: int, values_first: bool) -> Tensor:
    """K [..., D] and V [..., Dv] to one latent [..., D + Dv], as multi-head latent attention keeps it.

    There one vector of 576 numbers is the key, and its first 512 are the value as well; the last 64, the rotary part,
    belong to the key alone (FlashMLA, README: head_dim 576, head_dim_v 512). Any K and V with D + Dv = 576 are such a
    cache if what is no key meets zeros in the query (`latent_query`), and what is no value is cut from the output
    (`from_latent_out`). Both are exact. The last `rope` numbers are always key; the order of the rest is free:

        values_first        [ V  | K                  ]
        not values_first    [ K without its end | V | end of K ]

    With D = 320 and Dv = 256 both orders together use each of the first 512 as a key and as a value.

    Raises:
        ValueError: D is less than rope.

    Example:
        >>> key, value = torch.tensor([1, 2, 3]), torch.tensor([7, 8])
        >>> to_latent(key, value, 1, values_first=True).tolist(), to_latent(key, value, 1, values_first=False).tolist()
        ([7, 8, 1, 2, 3], [1, 2, 7, 8, 3])
    """
    shared = key_cache.shape[-1] - rope
    if shared < 0:
        raise ValueError(f"the last {rope} numbers of a latent are key; D is {key_cache.shape[-1]}, fewer")
    if values_first:
        return torch.cat((value_cache, key_cache), dim=-1)
    return torch.cat((key_cache[..., :shared], value_cache, key_cache[..., shared:]), dim=-1)


def from_latent(cache: Tensor, head_dim: int, rope: int, values_first: bool) -> tuple[Tensor, Tensor]:
    """The latent [..., D + Dv] back to K [..., D] and V [..., Dv]."""
    if values_first:
        value_dim = cache.shape[-1] - head_dim
        return cache[..., value_dim:], cache[..., :value_dim]
    shared, end = head_dim - rope, cache.shape[-1] - rope
    return torch.cat((cache[..., :shared], cache[..., end:]), dim=-1), cache[..., shared:end]


def latent_query(query: Tensor, value_dim: int, rope: int, values_first: bool) -> Tensor:
    """Queries [..., D] for a latent cache [..., D + Dv]: zeros meet the values.

    Example:
        >>> latent_query(torch.tensor([1, 2, 3]), 2, 1, values_first=False).tolist()
        [1, 2, 0, 0, 3]
    """
    return to_latent(query, query.new_zeros(*query.shape[:-1], value_dim), rope, values_first)


def from_latent_out(out: Tensor, value_dim: int, values_first: bool) -> Tensor:
    """The weighted sum [..., D + Dv - rope] of a latent's first numbers to that of V, [..., Dv]."""
    return out[..., :value_dim] if values_first else out[..., out.shape[-1] - value_dim :]


class Latent(Foreign):
    """Multi-head latent attention: one KV head, whose 576 numbers are the key and the first 512 of them the value.

        kernel(query, kv_cache, block_tables, seq_lens, query_start_loc, *, scale) -> out | (out, lse)

    with query [T, Hq, 576], kv_cache [N, P, 1, 576], tables as in the contract, out [T, Hq, 512] and lse [T, Hq]. After
    FlashMLA, flash_mla/flash_mla_interface.py, `flash_mla_with_kvcache`, with packed queries instead of one number of
    them for all sequences.

    Declare head_dims and value_dims that make 576 together, at least 64 of them D, as head_dims=(320,) and
    value_dims=(256,): such a K and V lie in one latent cache, and which of the 512 are a key and which are a value
    changes from case to case (`to_latent`). As there is one KV head, the kernel is called once for
    each of a case's.

    Args:
        name: by which `verify` knows it.
        value_width: 512, how many of the first numbers are the value.
        rope: 64, how many more belong to the key alone.
    """

    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("window", "softcap", "alibi", "sinks", "kv_scales='tensor'", "kv_scales='head'", "kv_scales='token'"),
        NO_ARGUMENT,
    )

    def __init__(self, name: str = "mla", value_width: int = 512, rope: int = 64) -> None:
        self.name, self.value_width, self.rope = name, value_width, rope

    def refuse(self, capabilities: Capabilities) -> None:
        """See that D and Dv share the latent's numbers.

        Raises:
            ValueError: they do not, or a feature that the kernel has no argument for.
        """
        super().refuse(capabilities)
        width = self.value_width + self.rope
        for head_dim in capabilities.head_dims:
            value_dim = capabilities.value_dim_for(head_dim)
            if head_dim + value_dim != width or head_dim < self.rope:
                raise ValueError(
                    f"adapter {self.name!r} cannot express head_dim {head_dim} with value_dim {value_dim}: they make "
                    f"{width} together, at least {self.rope} of it head_dim; declare head_dims and value_dims"
                )

    def call(self, kernel: Callable[..., Any], inputs: Inputs, capabilities: Capabilities) -> Any:
        """Call the kernel for one KV head after the other, and put their query heads together again.

        Returns:
            out or (out, lse); or a `Mishap` if the kernel wrote into an argument or out has another shape; or what the
            kernel returned if that is something else.
        """
        case = inputs.case
        values_first = case.seed % 2 == 0
        outs, lses = [], []
        for head in range(case.num_kv_heads):
            keys, values = (cache[:, :, head : head + 1] for cache in (inputs.key_cache, inputs.value_cache))
            latent = spaced(to_latent(keys, values, self.rope, values_first), case)
            query = inputs.query[:, head * case.query_group : (head + 1) * case.query_group]
            query = latent_query(query, case.value_dim, self.rope, values_first)
            tensors = (query, latent, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc)
            returned = call_unwritten(kernel, tensors, {"scale": inputs.scale})
            out, lse = self.results(returned)
            if not isinstance(out, Tensor):
                return returned
            wanted = (case.num_queries, case.query_group, self.value_width)
            if tuple(out.shape) != wanted:
                return Mishap("shape", f"out is {list(out.shape)}; [T, Hq, {self.value_width}] is {list(wanted)}")
            outs.append(from_latent_out(out, case.value_dim, values_first))
            lses.append(lse)
        if not all(isinstance(lse, Tensor) for lse in lses):
            return torch.cat(outs, dim=1)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
