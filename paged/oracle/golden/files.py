"""The tensors of one golden file, and of the file of outputs that is judged.

A golden file holds what a kernel is called with, what is right, and how far from it a right kernel may be:

    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc     as in the contract, dense
    scale, window, softcap                  one number each, float64, int32, float64; the last two where there are such
    alibi_slopes, sinks, k_scale, v_scale   where there are such
    out, lse                                float64, what is right
    out_bound, lse_bound                    float64, by how much each element may be off

An element is right if it equals what is expected, if both are NaN, or if |got - expected| <= bound. Where anything is
right the bound is infinite. There are no other rules, and no metadata, whose order differs from one run to the next.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from paged.oracle.declarations import ROUNDOFF, Conventions
from paged.oracle.expected import Expected
from paged.oracle.inputs import Inputs

ALWAYS = ("query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc")
WHERE_GIVEN = ("alibi_slopes", "sinks", "k_scale", "v_scale")
EXPECTED = ("out", "lse", "out_bound", "lse_bound")


def input_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """What a kernel is called with, dense, scalars as tensors of one number.

    Example:
        >>> from paged.oracle.case import Case
        >>> from paged.oracle.inputs import materialise
        >>> tensors = input_tensors(materialise(Case(sequences=((1, 3),), window=2)))
        >>> tensors["scale"].item(), tensors["window"].item(), "softcap" in tensors
        (0.09375, 2, False)
    """
    tensors = {name: getattr(inputs, name).contiguous() for name in ALWAYS}
    tensors["scale"] = torch.tensor([inputs.scale], dtype=torch.float64)
    if inputs.window is not None:
        tensors["window"] = torch.tensor([inputs.window], dtype=torch.int32)
    if inputs.softcap is not None:
        tensors["softcap"] = torch.tensor([inputs.softcap], dtype=torch.float64)
    for name in WHERE_GIVEN:
        given = getattr(inputs, name)
        if given is not None:
            tensors[name] = torch.as_tensor(given).contiguous()
    return tensors


def expected_tensors(expected: Expected, conventions: Conventions) -> dict[str, Tensor]:
    """What is right, and the room around it: out, out_bound [T, Hq, Dv], lse, lse_bound [T, Hq].

    Args:
        expected: from `solve`.
        conventions: whether rows that see no key are judged.
    """
    # A log-sum-exp comes as float32, and rounding it to that is nobody's mistake.
    rounded = ROUNDOFF["float32"] * torch.where(expected.lse.isfinite(), expected.lse, 0.0).abs()
    lse_bound = torch.where(expected.lse.isfinite(), expected.lse_bound + rounded, 0.0)
    out, out_bound, lse = expected.out, expected.bound, expected.lse
    rows = expected.empty[:, None]
    if conventions.empty_out == "any":
        out, out_bound = (torch.where(rows[..., None], x, y) for x, y in ((0.0, out), (torch.inf, out_bound)))
    if conventions.empty_lse == "any":
        lse, lse_bound = (torch.where(rows, x, y) for x, y in ((0.0, lse), (torch.inf, lse_bound)))
    both = {"out": out, "out_bound": out_bound, "lse": lse, "lse_bound": lse_bound}
    return {name: tensor.contiguous() for name, tensor in both.items()}


def any_rows(expected: Expected, conventions: Conventions) -> dict[str, list[int]]:
    """Rows of out and of lse in which anything is right."""
    empty = [int(row) for row in expected.empty.nonzero()[:, 0]]
    return {
        "out": empty if conventions.empty_out == "any" else [],
        "lse": empty if conventions.empty_lse == "any" else [],
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the inputs among some tensors, by names, dtypes, shapes and bits, NaN payloads included."""
    inputs = {name: tensor for name, tensor in tensors.items() if name not in EXPECTED}
    return hashlib.sha256(save(inputs)).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a safetensors file, and the sha256 of its bytes.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        return load(content), hashlib.sha256(content).hexdigest()
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
