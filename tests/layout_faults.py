"""Mistakes that can only be made in one layout: for each adapter of the oracle, kernels that misread what they get.

A fault is a right kernel of layout_kernels.py that is handed what it takes its arguments for.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from layout_kernels import KERNELS
from torch import Tensor

from paged.oracle import Case
from paged.oracle.adapters import SHIPPED
from paged.oracle.adapters.foreign import Foreign
from paged.oracle.adapters.latent import Latent

Named = dict[str, Any]

# Multi-head latent attention of 24 + 8 numbers; with 512 + 64 everything takes ten times as long.
SMALL_LATENT = Latent("mla of 24 + 8", value_width=24, rope=8)
PAIRS: dict[str, tuple[Foreign, Callable[..., Any]]] = {
    **{adapter.name: (adapter, KERNELS[adapter.name]) for adapter in SHIPPED},
    "mla": (SMALL_LATENT, partial(KERNELS["mla"], value_width=24)),
}


@dataclass(frozen=True)
class Fault:
    """A mistake in one layout.

    Attributes:
        adapter: whose kernel makes it.
        mistake: in words.
        named: what the oracle calls it.
        reads: of the arguments that are misread, what each is taken for; from all arguments by name.
        case: where it is called so; None: the first of the directed cases that fails.
    """

    adapter: str
    mistake: str
    named: str
    reads: dict[str, Callable[[Named], Any]]
    case: Case | None = None

    def kernel(self, *tensors: Any, **wishes: Any) -> Any:
        """The kernel that makes the mistake."""
        right = PAIRS[self.adapter][1]
        bound = inspect.signature(right).bind(*tensors, **wishes)
        bound.arguments.update({name: read(dict(bound.arguments)) for name, read in self.reads.items()})
        return right(*bound.args, **bound.kwargs)


def taken(name: str, as_what: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Named], Tensor]]:
    """One argument that is taken for something that follows from it alone."""
    return {name: lambda given: as_what(given[name])}


def heads_for_slots(cache: Tensor) -> Tensor:
    """Memory of [N, Hkv, P, D] read as if it were [N, P, Hkv, D]; given back in the first order."""
    blocks, heads, size, width = cache.shape
    return cache.reshape(blocks, size, heads, width).transpose(1, 2)


def halves_exchanged(cache: Tensor) -> Tensor:
    """[..., D + D] read with the value before the key."""
    return cache.roll(cache.shape[-1] // 2, -1)


def planes_for_pairs(cache: Tensor) -> Tensor:
    """Memory of [N, H, P, D + D] read as if each head had all its keys first, and then all its values."""
    blocks, heads, size, width = cache.shape
    return cache.reshape(blocks, heads, 2, size, width // 2).transpose(2, 3).reshape(cache.shape)


def x_outside(cache: Tensor) -> Tensor:
    """[N, Hkv, D / x, P, x] read with number d at [d % (D / x), slot, d // (D / x)]."""
    blocks, heads, pieces, size, x = cache.shape
    return cache.permute(0, 1, 4, 2, 3).reshape(blocks, heads, pieces, x, size).transpose(3, 4)


def slots_for_numbers(cache: Tensor) -> Tensor:
    """Memory of [N, Hkv, Dv, P] read as if it were [N, Hkv, P, Dv]; given back in the first order."""
    blocks, heads, width, size = cache.shape
    return cache.reshape(blocks, heads, size, width).transpose(2, 3)


def halves_for_turns(pages: Tensor) -> Tensor:
    """[N, P, 2 * Hkv, D] read with all keys in the first half of the heads, and all values in the second."""
    heads = pages.shape[2] // 2
    return torch.stack((pages[:, :, :heads], pages[:, :, heads:]), dim=3).flatten(2, 3)


def no_rope(query: Tensor) -> Tensor:
    """The last eight numbers, which belong to the key alone, left out of the product."""
    return torch.cat((query[..., :-8], torch.zeros_like(query[..., -8:])), dim=-1)


def as_table(given: Named) -> Tensor:
    """Where a sequence's pages would begin if all had as many as the longest has."""
    indptr = given["paged_kv_indptr"]
    return torch.arange(len(indptr)) * indptr.diff().max()


def without_new_tokens(given: Named) -> Tensor:
    """Lengths taken for those before this step, to which its own tokens have to be added."""
    return (given["cache_seqlens"] - given["cu_seqlens_q"].diff()).clamp(min=0)


def reshaped(name: str) -> dict[str, Callable[[Named], Tensor]]:
    """[2, N, ...] in memory that holds [N, 2, ...], or the other way round."""
    return taken(name, lambda cache: cache.reshape(cache.transpose(0, 1).shape).transpose(0, 1))


def late(name: str) -> dict[str, Callable[[Named], Tensor]]:
    """A list of starts that is read one entry too far: each sequence has the part of the next one."""
    return taken(name, lambda starts: torch.cat((starts[1:], starts[-1:])))


def full_last_pages(given: Named) -> Tensor:
    """As many tokens on every last page as fit."""
    return torch.full_like(given["paged_kv_last_page_len"], given["paged_kv_cache"].shape[2])


def trash_for_slots(given: Named) -> Tensor:
    """Every token written to the last slot, which is nobody's."""
    return torch.full_like(given["write_index"], len(given["key_cache"]) - 1)


def left_with_self(given: Named) -> tuple[int, int]:
    """A number of keys before the query that is taken to count the query."""
    return max(0, given["window_size"][0] - 1), 0


BOTH_NHD = taken("key_cache", heads_for_slots) | taken("value_cache", heads_for_slots)
PAGES_NHD = taken("paged_kv_cache", lambda c: heads_for_slots(c.flatten(0, 1)).reshape(c.shape))
EXCHANGED = "keys and values are exchanged"
READ_WRONG = "values are read wrong, as many tokens as there are"
OTHERS = "other tokens are read"
TOO_MANY = "tokens are counted that should not be"
TWO = Case(sequences=((1, 7), (2, 10)), num_kv_heads=2, head_dim=8, value_dim=8, block_size=4, recipe="uniform")
ONE, RANDOM = TWO.replace(sequences=((2, 10),)), TWO.replace(recipe="random")

FAULTS = (
    Fault("hnd", "NHD for HND", OTHERS, BOTH_NHD),
    Fault("hnd", "NHD for HND, in V alone", OTHERS, taken("value_cache", heads_for_slots)),
    Fault("vllm_stacked", "V for K, K for V", EXCHANGED, taken("kv_cache", lambda cache: cache.flip(0)), RANDOM),
    Fault("vllm_stacked", "[N, 2] for [2, N]", READ_WRONG, reshaped("kv_cache")),
    Fault("vllm_by_block", "V for K, K for V", EXCHANGED, taken("kv_cache", lambda cache: cache.flip(1)), RANDOM),
    Fault("vllm_by_block", "[2, N] for [N, 2]", OTHERS, reshaped("kv_cache")),
    Fault("vllm_packed", "value before key", EXCHANGED, taken("kv_cache", halves_exchanged), RANDOM),
    Fault("vllm_packed", "all keys of a head, then its values", READ_WRONG, taken("kv_cache", planes_for_pairs)),
    Fault("vllm_x_packed", "x outside", "dims of keys are in another order: 2 groups of 4 taken for 4 of 2",
          taken("key_cache", x_outside)),
    Fault("vllm_x_packed", "V not transposed", READ_WRONG, taken("value_cache", slots_for_numbers)),
    Fault("mla", "the latent's last numbers as value", READ_WRONG, taken("kv_cache", lambda c: c.roll(-8, -1))),
    Fault("mla", "the rotary part is no key", "the log-sum-exp is wrong, the output is right", taken("query", no_rope)),
    Fault("flashinfer", "last_page_len one short", "causal edge off by one: one key too few",
          taken("paged_kv_last_page_len", lambda counts: (counts - 1).clamp(min=0))),
    Fault("flashinfer", "last pages full", "a last block's capacity is taken for its length",
          {"paged_kv_last_page_len": full_last_pages}),
    Fault("flashinfer", "indptr of the next request", OTHERS, late("paged_kv_indptr")),
    Fault("flashinfer", "the list of pages a table", "tokens are not counted", {"paged_kv_indptr": as_table}, TWO),
    Fault("flashinfer_hnd", "NHD for HND", OTHERS, PAGES_NHD),
    Fault("flashinfer_hnd", "V for K, K for V", EXCHANGED, taken("paged_kv_cache", lambda c: c.flip(1)), RANDOM),
    Fault("flash_attention", "window_size counts the query", "window edge off by one: one token too narrow",
          {"window_size": left_with_self}, TWO.replace(window=5)),
    Fault("flash_attention", "cache_seqlens without new tokens", "tokens are not counted",
          {"cache_seqlens": without_new_tokens}, TWO),
    Fault("flash_attention", "k_descale for V", "values are scaled with k_scale",
          {"v_descale": lambda given: given.get("k_descale")}),
    Fault("sglang", "kv_indptr of the next request", "rows are 0", late("kv_indptr"), ONE),
    Fault("sglang", "slots counted from 1", OTHERS, taken("kv_indices", lambda slots: slots - 1)),
    Fault("sglang_requests", "row by place in the batch", OTHERS,
          taken("req_pool_indices", lambda rows: torch.arange(len(rows)))),
    Fault("sglang_requests", "row of the next request", OTHERS,
          taken("req_pool_indices", lambda rows: rows.roll(-1))),
    Fault("sglang_requests", "one token too many", TOO_MANY, taken("seq_lens", lambda lengths: lengths + 1)),
    Fault("jax_ragged", "values at even heads", EXCHANGED,
          taken("kv_pages", lambda pages: pages.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)), RANDOM),
    Fault("jax_ragged", "all keys before all values", READ_WRONG, taken("kv_pages", halves_for_turns)),
    Fault("transformers", "read before it is written", "returns NaN or infinities", {"write_index": trash_for_slots}),
    Fault("transformers", "written a slot too far", "writes into its inputs", taken("write_index", lambda w: w + 1)),
    Fault("transformers", "cu_seq_lens_k of the next request", "rows are 0", late("cu_seq_lens_k"), ONE),
)  # fmt: skip
