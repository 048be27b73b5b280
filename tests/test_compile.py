"""What the compiler makes of the fused form and of writing into the pool, read from the code it generates.

The sizes are primes that occur nowhere else, so that a buffer's axes can be told from its size: one that is divisible
by the context and by a head dim holds gathered keys or values.
"""

import math
import re
import shutil

import pytest
import torch
from helpers import as_prompts, load, token_prompts, tokens_of
from torch._inductor.utils import run_and_get_code

from paged import SamplingParams
from paged.attention import fused, gathered
from paged.kv_pool import LayerShape, allocate_layer, write
from paged.quantisation import stored_dtype

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)

# Five sequences, since for up to four the compiler unrolls the search for a token's sequence, and torch 2.11 then finds
# the index of the gather too long to repeat in every loop.
B, M, P, N = 5, 7, 11, 37
HKV, GROUP, D, DV = 2, 3, 13, 17
CONTEXT = M * P


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tables = (torch.randperm(N - 2, generator=generator) + 1)[: B * M].reshape(B, M).int()
    return {
        "query": torch.randn(B + 3, HKV * GROUP, D, generator=generator),
        "key_cache": torch.randn(N, P, HKV, D, generator=generator),
        "value_cache": torch.randn(N, P, HKV, DV, generator=generator),
        "block_tables": tables,
        "seq_lens": torch.tensor([CONTEXT, 40, 23, 1, 50], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 5, 6, 7, 8], dtype=torch.int32),
    }


FEATURES = {"window": 50, "softcap": 2.0, "sinks": torch.linspace(-1, 1, HKV * GROUP)}


def buffer_sizes(codes: list[str]) -> list[int]:
    """Elements of every buffer that the generated code allocates."""
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", "\n".join(codes))
    return [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]


def gathered_buffers(codes: list[str]) -> list[int]:
    """The buffers that have a context axis and a head-dim axis."""
    return [n for n in buffer_sizes(codes) if n % CONTEXT == 0 and (n % D == 0 or n % DV == 0)]


def pool_sized_buffers(codes: list[str]) -> list[int]:
    """The buffers that are as large as a pool or larger."""
    return [n for n in buffer_sizes(codes) if n >= N * P * HKV * D]


def compiled(function, *arguments, **keywords):
    """The result and the generated code; fullgraph, so that nothing falls back to eager in silence."""
    return run_and_get_code(torch.compile(function, fullgraph=True, dynamic=False), *arguments, **keywords)


def test_fused_never_holds_gathered_keys_or_values():
    arguments = {**tensors(), "scale": 0.3, "max_query_len": 4, **FEATURES}
    (out, lse), codes = compiled(fused.paged_attention, **arguments)
    assert buffer_sizes(codes), "no buffer was found: the pattern does not fit the generated code"
    assert gathered_buffers(codes) == []
    expected_out, expected_lse = fused.paged_attention(**arguments)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_the_detector_sees_the_gathered_form():
    arguments = {**tensors(), "scale": 0.3, "max_query_len": 4, **FEATURES}
    (out, _), codes = compiled(gathered.paged_attention, **arguments)
    assert len(gathered_buffers(codes)) >= 2, "keys and values, at least"
    torch.testing.assert_close(out, gathered.paged_attention(**arguments)[0])


def new_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(4, HKV, D, generator=generator)
    value = torch.randn(4, HKV, DV, generator=generator)
    return key, value, torch.tensor([P + 2, 5 * P, 5 * P + 1, (N - 1) * P])


def layer(query, key_cache, value_cache, key, value, slots, *, k_scale=None, v_scale=None, **arguments):
    """What every attention layer does: write, then attend."""
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    write(key_cache, value_cache, key, value, slots, **scales)
    return fused.paged_attention(query, key_cache, value_cache, **scales, **arguments)[0]


def test_writing_copies_no_pool():
    t = tensors()
    key, value, slots = new_tokens()
    caches = [t.pop("key_cache"), t.pop("value_cache")]
    copies = [cache.clone() for cache in caches]
    query = t.pop("query")
    out, codes = compiled(layer, query, *caches, key, value, slots, scale=0.3, **t)
    assert buffer_sizes(codes)
    assert pool_sized_buffers(codes) == []
    torch.testing.assert_close(out, layer(query, *copies, key, value, slots, scale=0.3, **t))
    for cache, copy in zip(caches, copies, strict=True):
        assert torch.equal(cache, copy), "the compiled write is not the eager one"


@pytest.mark.parametrize("kind", ["fp8", "fp8_per_head", "int8"])
def test_a_quantised_cache_is_written_and_read_in_place(kind):
    """No copy of a pool or of its scales, no gathered codes or numbers; and the codes of the eager write."""
    t = tensors()
    key, value, slots = new_tokens()
    key[1, 0, 3] = torch.nan  # in a slot that no table names
    shape = LayerShape(HKV, D, DV)
    stored = allocate_layer(shape, N, P, stored_dtype(kind, torch.float32), "cpu")
    fixed = torch.tensor([2.0**-5, 2.0**-6]) if kind == "fp8_per_head" else torch.tensor(2.0**-5)
    scales = stored[2:] or (fixed, fixed * 2)
    everywhere = torch.arange(N * P)
    old_key, old_value = t.pop("key_cache").flatten(0, 1), t.pop("value_cache").flatten(0, 1)
    write(*stored[:2], old_key, old_value, everywhere, k_scale=scales[0], v_scale=scales[1])
    query = t.pop("query")
    t["block_tables"][t["block_tables"] == 5] = 1

    def run(function, caches, scales):
        return function(query, *caches[:2], key, value, slots, k_scale=scales[0], v_scale=scales[1], scale=0.3, **t)

    copies = [tensor.clone() for tensor in stored]
    out, codes = run(lambda *a, **k: compiled(layer, *a, **k), stored, scales)
    assert buffer_sizes(codes)
    assert pool_sized_buffers(codes) == []
    assert gathered_buffers(codes) == []
    assert not [n for n in buffer_sizes(codes) if n % (N * P) == 0], "one number for each slot: the scales of a pool"
    torch.testing.assert_close(out, run(layer, copies, copies[2:] or scales))
    for cache, copy in zip(stored, copies, strict=True):
        if cache.dtype == torch.float32:  # the scales of int8, a NaN among them
            torch.testing.assert_close(cache, copy, rtol=2.0**-22, atol=0, equal_nan=True)
        else:
            assert torch.equal(cache.view(torch.uint8), copy.view(torch.uint8)), (
                "the compiled write is not the eager one"
            )


def test_the_detector_sees_a_copied_pool():
    """Written through one layer of a pool for all layers, as is natural and wrong."""

    def write_stacked(pool, key, slots):
        pool[1][slots // P, slots % P] = key
        return pool[1].sum()

    key, _, slots = new_tokens()
    _, codes = compiled(write_stacked, torch.zeros(2, N, P, HKV, D), key, slots)
    assert pool_sized_buffers(codes)


def test_one_graph_serves_every_shape():
    """dynamic=True: batches of all sizes above one, without falling back and with one graph."""
    torch._dynamo.utils.counters.clear()
    function = torch.compile(fused.paged_attention, fullgraph=True, dynamic=True, backend="eager")
    t = tensors()
    queries, tables = t["query"].repeat(4, 1, 1), t["block_tables"].repeat(3, 1)
    # No two sizes alike in the first call: the compiler would take them for one size and compile again. And clones, not
    # views: it compiles anew for a tensor that has no base where the first one had one.
    batches = [
        {
            "query": queries[: 2 * num].clone(),
            "key_cache": t["key_cache"],
            "value_cache": t["value_cache"],
            "block_tables": tables[:num, :width].clone(),
            "seq_lens": torch.full((num,), width * P, dtype=torch.int32),
            "query_start_loc": torch.arange(num + 1, dtype=torch.int32) * 2,
        }
        for num, width in ((8, 7), (9, 5), (6, 4))
    ]
    for batch in batches:
        function(**batch, scale=0.3, max_query_len=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_a_compiled_engine_gives_the_same_tokens(kind, folders):
    """Compiled layers: one graph for prompts and decodes, shared by all layers."""
    prompts = as_prompts(token_prompts([9, 30, 17]))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    settings = {"block_size": 8, "max_num_seqs": 3, "kv_cache_dtype": kind}
    eager = load(folders["llama"], **settings)
    torch._dynamo.utils.counters.clear()
    compiled_llm = load(folders["llama"], enforce_eager=False, **settings)
    assert compiled_llm.engine.runner.attention_form == "fused"
    assert tokens_of(compiled_llm.generate(prompts, params)) == tokens_of(eager.generate(prompts, params))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
