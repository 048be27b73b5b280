"""Test set-ups that other projects publish for their paged attention kernels, described again from their sources.

What is kept: lengths, heads, widths and block sizes; how numbers are drawn; how tables are made; what unused slots
hold; what is on; what the reference computes in; and the rule that accepts. What is not: the kernels themselves, and
sizes that a CPU cannot do in minutes; `scaled` says which. Facts only, no code.
"""

from dataclasses import dataclass

from suites.rules import close, flash_mla, times_low_precision
from suites.setup import Setup


@dataclass(frozen=True)
class Suite:
    """One published set-up.

    Attributes:
        name: a word for the table.
        source: repository and path of the test.
        rule: how it accepts, in words.
        scaled: what is smaller here than there.
        setups: its calls.
    """

    name: str
    source: str
    rule: str
    scaled: str
    setups: tuple[Setup, ...]


def _vllm_paged() -> Suite:
    lengths = tuple((1, n) for n in (2931, 1717, 3360, 419, 2048, 1130, 4096))
    plain = Setup(lengths, (8, 2), 64, 16, close(1e-3, 1e-5), values="uniform", spread=64**-0.5)
    wide = plain.but(heads=(5, 5), head_dim=128, block_size=32, spread=128**-0.5, dtype="float16", num_blocks=512)
    fp8 = plain.but(kv_dtype="float8_e4m3fn", kv_scales="tensor", scale_values=(0.5, 0.25), unused="nan in V")
    return Suite(
        "vLLM paged",
        "vllm-project/vllm tests/kernels/attention/test_attention.py",
        "allclose 1e-3 / 1e-5, fp8 1e-2; reference in low precision",
        "lengths to 4096 of 16k and more, a fifth of the heads, a quarter of the pool",
        (plain, wide, plain.but(slopes="normal"), plain.but(heads=(8, 1)), fp8.but(accepts=close(1e-2, 1e-5))),
    )


def _vllm_unified() -> Suite:
    mixed, decodes = ((1, 1328), (5, 18), (129, 463)), ((1, 523), (1, 37), (1, 2011))
    plain = Setup(mixed, (4, 4), 128, 16, close(1.5e-2, 1e-2), num_blocks=2048)
    fp8 = plain.but(kv_dtype="float8_e4m3fn", kv_scales="head", scale_values=(0.5, 0.25), unquantised=True)
    return Suite(
        "vLLM unified",
        "vllm-project/vllm tests/kernels/attention/test_triton_unified_attention.py",
        "allclose 1.5e-2 / 1e-2, fp8 0.15 / 0.15 against a reference that was never quantised",
        "head_dim 256 and pools of 32,768 blocks are left out",
        (
            plain,
            plain.but(heads=(8, 2), sequences=decodes, window=64),
            plain.but(heads=(5, 1), window=128, softcap=50.0),
            plain.but(heads=(8, 2), window=256),
            plain.but(sequences=decodes, softcap=50.0),
            fp8.but(accepts=close(0.15, 0.15)),
            fp8.but(accepts=close(0.15, 0.15), heads=(8, 2), sequences=decodes),
        ),
    )


def _vllm_prefix() -> Suite:
    contexts = (430, 956, 818, 865, 326, 1007, 504, 382, 613, 929)  # what its seed draws
    chunks = (110, 51, 99, 115, 55, 7, 35, 125, 67, 1)  # an eighth of what it draws
    lengths = tuple((q, q + n) for q, n in zip(chunks, contexts, strict=True))
    plain = Setup(lengths, (8, 8), 24, 32, close(1e-4, 0.0), dtype="float16", values="uniform", spread=1e-3)
    plain = plain.but(table="permutation", unused="zeros")
    fp8 = plain.but(kv_dtype="float8_e4m3fn", kv_scales="tensor", scale_values=(1.0, 1.0), unquantised=True)
    return Suite(
        "vLLM prefix",
        "vllm-project/vllm tests/kernels/attention/test_prefix_prefill.py",
        "atol 1e-4, fp8 1e-3, rtol 0, for numbers of at most 1e-3",
        "8 heads of 64, chunks of an eighth of their tokens, head_dim 128 once",
        (
            plain,
            plain.but(heads=(8, 1), head_dim=128),
            plain.but(window=16),
            plain.but(window=2048),
            plain.but(slopes="powers"),
            fp8.but(accepts=close(1e-3, 0.0)),
        ),
    )


def _vllm_backends() -> Suite:
    plain = Setup(((1, 32), (1, 40)), (8, 2), 128, 16, close(1e-2, 1e-2), table="permutation", unused="zeros")
    medium = tuple((q, n) for q in (1, 7) for n in (512, 1024, 2048))
    return Suite(
        "vLLM v1",
        "vllm-project/vllm tests/v1/attention/test_attention_backends.py",
        "allclose 1e-2 / 1e-2",
        "8 heads of 32, the specs to 2048 tokens; of large_decode 8 sequences of 32",
        (
            plain,
            plain.but(sequences=((8, 32), (8, 40))),
            plain.but(sequences=((1, 32), (1, 40), (5, 48), (5, 56))),
            plain.but(sequences=medium),
            plain.but(sequences=medium, window=1023),
            plain.but(sequences=((64, 1024),)),
            plain.but(sequences=((1, 2048),) * 8),
        ),
    )


def _flash_attention_2() -> Suite:
    plain = Setup(((1, 339), (1, 127)), (6, 6), 128, 256, times_low_precision(3), dtype="float16", table="permutation")
    plain = plain.but(reference="float32")
    return Suite(
        "FA2",
        "Dao-AILab/flash-attention tests/test_flash_attn.py, test_flash_attn_kvcache",
        "largest error at most 3 times that of PyTorch in float16 (5 times with ALiBi), plus 1e-5",
        "lengths to 4096 of 131,072; three of six widths",
        (
            plain,
            plain.but(sequences=((3, 799), (3, 412)), heads=(6, 3), head_dim=59),
            plain.but(sequences=((64, 2048), (64, 1371)), heads=(6, 1), window=731),
            plain.but(sequences=((16, 4096), (16, 2977)), heads=(6, 3), head_dim=64),
            plain.but(sequences=((64, 800), (64, 503)), slopes="powers", accepts=times_low_precision(5)),
            plain.but(sequences=((8, 3131), (8, 1)), window=211, heads=(6, 3)),
        ),
    )


def _flash_attention_3() -> Suite:
    plain = Setup(tuple((1, n) for n in (128, 71, 15, 99, 3)), (6, 6), 128, 128, times_low_precision(2, 1.5))
    plain = plain.but(table="permutation", reference="float32")
    chunks = tuple((q, n) for q, n in ((64, 256), (31, 199), (64, 64), (5, 230), (1, 77)))
    fp8 = plain.but(kv_dtype="float8_e4m3fn", kv_scales="head", accepts=times_low_precision(4, 3), sequences=chunks)
    return Suite(
        "FA3",
        "Dao-AILab/flash-attention hopper/test_flash_attn.py, test_flash_attn_kvcache",
        "largest error at most 2 times that of PyTorch in bfloat16, mean 1.5 times (fp8: 4 and 3), plus 1e-5",
        "lengths to 2048 of 131,072",
        (
            plain,
            plain.but(sequences=chunks, heads=(6, 3), block_size=4),
            plain.but(sequences=((64, 2048), (64, 911), (64, 1600), (3, 70), (20, 20)), heads=(6, 1), window=800),
            plain.but(sequences=((3, 1024), (3, 500), (2, 3), (3, 777), (1, 1)), heads=(6, 3), block_size=1),
            fp8,
        ),
    )


def _flashinfer() -> Suite:
    plain = Setup(
        ((1, 54),) * 12, (4, 4), 128, 8, close(1e-3, 1e-3), dtype="float16", table="identity", reference="float32"
    )
    return Suite(
        "FlashInfer",
        "flashinfer-ai/flashinfer tests/attention/test_batch_decode_kernels.py, test_batch_prefill_kernels.py",
        "allclose 1e-3 / 1e-3 against its own kernel for one request",
        "12 sequences of up to 128, lengths to 2048 of 16,384, 16 query heads of 32",
        (
            plain,
            plain.but(sequences=((1, 97),) * 12, heads=(16, 4), block_size=16),
            plain.but(sequences=((1, 512),) * 12, block_size=1),
            plain.but(sequences=((1, 2048),) * 12, heads=(16, 4), block_size=16),
            plain.but(sequences=((37, 54),) * 12, block_size=5, heads=(16, 4)),
            plain.but(sequences=((17, 97),) * 12, strided=True, block_size=16),
            plain.but(sequences=((1, 97),) * 12, kv_dtype="float8_e4m3fn", block_size=16),
        ),
    )


def _flash_mla() -> Suite:
    lengths = ((1, 933), (1, 0), (1, 64), (1, 1411), (1, 127), (1, 2000))
    plain = Setup(lengths, (3, 1), 576, 64, flash_mla, value_dim=512, value_is_key=True, spread=0.1)
    plain = plain.but(table="permutation", unused="nan", padding="garbage", reference="float32", checks_lse=True)
    return Suite(
        "FlashMLA",
        "deepseek-ai/FlashMLA tests/test_flash_mla_dense_decoding.py, tests/kernelkit/compare.py",
        "absolute 8e-4 or relative 0.0157, cosine 5e-6, log-sum-exp 1e-6 or 1.2e-4",
        "16 query heads of 128, lengths to 2000; its test of batch invariance is left out",
        (
            plain,
            plain.but(heads=(9, 1), sequences=((2, 933), (2, 64), (2, 1411))),
            plain.but(heads=(16, 1), sequences=((2, 1024), (2, 0), (2, 513)), dtype="float16"),
        ),
    )


def _sglang() -> Suite:
    lengths = ((90, 700), (31, 412), (3, 777), (64, 130), (101, 1203), (17, 18))
    plain = Setup(lengths, (12, 4), 128, 1, close(1e-3, 1e-2), table="identity", spread=0.2, mean=0.1)
    decode = Setup(((1, 10),) * 2, (4, 2), 64, 1, close(1e-2, 1e-2), table="identity", reference="float32")
    return Suite(
        "SGLang",
        "sgl-project/sglang test/registered/attention/test_triton_attention_kernels.py",
        "allclose 1e-3 / 1e-2 against another kernel of the repository, 1e-2 / 1e-2 and 3e-2 / 1e-5 for decodes",
        "chunks to 101 tokens and 6 sequences of 19, lengths to 1203 of 12,331",
        (
            plain,
            plain.but(head_dim=80),
            plain.but(head_dim=13),
            plain.but(head_dim=64, window=128),
            decode,
            decode.but(head_dim=13, heads=(4, 4)),
            decode.but(sequences=((1, 500),) * 2, heads=(16, 1), accepts=close(3e-2, 1e-5)),
            decode.but(sequences=((1, 128),) * 2, heads=(16, 1), head_dim=80, accepts=close(3e-2, 1e-5)),
        ),
    )


def _trt_llm() -> Suite:
    mixed = ((17, 17), (40, 300), (1, 129), (1, 1000), (1, 64))
    plain = Setup(mixed, (8, 2), 128, 64, close(3e-2, 3e-3), table="identity", unused="zeros")
    fp8 = plain.but(kv_dtype="float8_e4m3fn", kv_scales="tensor", scale_values=(1.0, 1.0), unquantised=True)
    return Suite(
        "TRT-LLM",
        "NVIDIA/TensorRT-LLM tests/unittest/_torch/attention/attention_test_harness.py",
        "allclose 1e-2 / 1e-3 in float16, 3e-2 / 3e-3 in bfloat16, 0.4 with fp8; reference in the same dtype",
        "lengths are ours, since its cases come from captures",
        (
            plain,
            plain.but(dtype="float16", accepts=close(1e-2, 1e-3)),
            plain.but(window=128),
            plain.but(sequences=((64, 64), (33, 700))),
            fp8.but(accepts=close(0.4, 0.0)),
        ),
    )


def _jax_paged() -> Suite:
    lengths = tuple((1, n) for n in (0, 3, 256, 513, 1023, 2048))
    plain = Setup(lengths, (1, 1), 128, 16, close(2e-1, 1e-1), dtype="float32", scale=1.0, table="permutation")
    plain = plain.but(reference="float32", skips_empty=True)
    shared = plain.but(heads=(8, 2), accepts=close(1e-2, 2e-2))
    return Suite(
        "JAX paged",
        "jax-ml/jax tests/pallas/tpu_paged_attention_kernel_test.py (skipped there, for data races)",
        "allclose 0.2 / 0.1 with a KV head for each head, 1e-2 / 2e-2 otherwise; empty rows are not compared",
        "2 KV heads of 8, head_dim 256 left out",
        (
            plain,
            shared,
            shared.but(softcap=1.0, block_size=32),
            shared.but(heads=(8, 1), dtype="bfloat16", block_size=64),
            shared.but(kv_dtype="int8", kv_scales="token"),
        ),
    )


def _jax_ragged() -> Suite:
    mixed = ((5, 18), (1, 129), (120, 597), (1, 122), (1, 64), (32, 322), (1, 1107), (99, 123), (3, 1229), (1, 1328))
    plain = Setup(mixed, (8, 2), 128, 16, close(0.15, 0.15), dtype="float32", scale=1.0, table="identity")
    plain = plain.but(reference="float32", unused="nan", same_kv=True)
    half = plain.but(dtype="bfloat16", accepts=close(0.2, 0.2))
    return Suite(
        "JAX ragged",
        "jax-ml/jax tests/pallas/tpu_ragged_paged_attention_test.py",
        "allclose 0.15 in float32, 0.2 in bfloat16; keys and values of all sequences begin alike",
        "8 heads of 32, ten of sixteen sequences",
        (
            plain,
            half,
            plain.but(sequences=tuple((q, n) for q, n in mixed if q > 1)),
            plain.but(sequences=((60, 78), (7, 41), (90, 92), (33, 50), (1, 49)), heads=(4, 4), window=5),
            plain.but(sequences=((60, 78), (7, 41), (90, 92), (33, 50), (1, 49)), heads=(16, 2), softcap=50.0),
            half.but(kv_dtype="float8_e4m3fn", kv_scales="tensor", scale_values=(0.5, 0.5)),
        ),
    )


def _aiter() -> Suite:
    plain = Setup(((1, 257),) * 8, (8, 1), 128, 16, close(1e-2, 1e-2, wrong_share=0.05), values="uniform")
    quantised = plain.but(kv_dtype="float8_e4m3fn", kv_scales="token", unquantised=True)
    return Suite(
        "aiter",
        "ROCm/aiter op_tests/test_pa.py",
        "allclose 1e-2 / 1e-2, and 5 % of the elements may be wrong",
        "8 sequences of 128, and fp8 is e4m3fn",
        (
            plain,
            plain.but(sequences=((1, 7),) * 8, heads=(10, 1)),
            plain.but(sequences=((1, 109),) * 8, dtype="float16"),
            plain.but(sequences=((1, 4097),) * 4),
            quantised,
            quantised.but(kv_dtype="int8"),
        ),
    )


SUITES = (
    _vllm_paged(),
    _vllm_unified(),
    _vllm_prefix(),
    _vllm_backends(),
    _flash_attention_2(),
    _flash_attention_3(),
    _flashinfer(),
    _flash_mla(),
    _sglang(),
    _trt_llm(),
    _jax_paged(),
    _jax_ragged(),
    _aiter(),
)
