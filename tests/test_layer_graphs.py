"""One graph of a layer serves every step of the flex form: prompts, decodes, captured batches, pools of any size.

On a CPU, with attention that gives zeros: what is held to account is what the compiler sees of the inputs. Whatever
makes it compile again costs seconds when an engine starts, or while it serves.
"""

import pytest
import torch
from helpers import load, token_prompts
from tiny_models import tiny_model
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from paged import SamplingParams
from paged.attention import cascade, dense, flex
from paged.model import flex_op, runner
from paged.model.decode_graphs import DecodeGraphs
from paged.model.largest_steps import largest_steps
from paged.model.memory_profile import TRIAL_BLOCKS

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def num_graphs(monkeypatch):
    """Let layers of the flex form be compiled on a CPU, leaving operations as they are: a list that grows by graph."""
    compiled: list[int] = []
    compile_module = nn.Module.compile

    def backend(module, inputs):
        compiled.append(len(compiled))
        return aot_eager(module, inputs)

    def compile_counted(layer, **options):
        del options["options"]  # Inductor's
        compile_module(layer, backend=backend, **options)

    def nothing(query: Tensor, _keys: Tensor, value_cache: Tensor, *_, **__):
        return query.new_zeros(*query.shape[:2], value_cache.shape[3]), query.new_zeros(query.shape[:2]).float()

    monkeypatch.setattr(nn.Module, "compile", compile_counted)
    monkeypatch.setattr(runner, "choose_form", lambda *_, **__: "flex")
    monkeypatch.setattr(flex, "attend_decode", nothing)
    monkeypatch.setattr(cascade, "attend", nothing)
    monkeypatch.setattr(dense, "supports", lambda *_: True)
    monkeypatch.setattr(
        flex_op, "_attend_dense", lambda query, key, value, keys, values, *_: nothing(query, keys, values)
    )
    return compiled


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_layer_is_compiled_once_and_once_for_a_batch_of_one(name, num_graphs, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    llm = load(
        tmp_path, device="cpu", dtype="bfloat16", enforce_eager=False, max_num_seqs=24, max_model_len=256,
        max_num_batched_tokens=512, block_size=16, num_gpu_blocks_override=300, cudagraph_capture_sizes=(),
    )  # fmt: skip
    model, config = llm.engine.runner, llm.engine.config
    model._flex._multiprocessors = 132
    # gemma2's layers with and without a window are two functions to the compiler.
    num_kinds = len(model._flex._windows)

    # As on a GPU at start: the largest steps and a captured batch on a small pool, then others on the real one.
    num_blocks = model.num_blocks
    model._allocate(TRIAL_BLOCKS)
    for step in largest_steps(config):
        model.run(step)
    model._builder.reset()
    run_captured(model, [24])
    model._allocate(num_blocks)
    run_captured(model, [24, 2, 4, 8, 16])
    assert len(num_graphs) == num_kinds
    run_captured(model, [1])
    assert len(num_graphs) == 2 * num_kinds

    for lengths in ([5], [5, 200], [3, 3, 3], [1], [200, 20, 1], [7] * 20):
        prompts = [{"prompt_token_ids": prompt} for prompt in token_prompts(lengths)]
        llm.generate(prompts, [GREEDY] * len(lengths))
    assert len(num_graphs) == 2 * num_kinds, "a step while serving was compiled"


@torch.inference_mode()
def run_captured(model: runner.ModelRunner, sizes: list[int]) -> None:
    """The forward passes that a GPU would capture for these sizes, with and without a prefix."""
    graphs = DecodeGraphs(model._forward, model._flex, model._builder.last_token_ids, with_cascade=True)
    graphs._batch = torch.zeros(5, max(2, *sizes), dtype=torch.int64)
    graphs._batch[0] = model._flex.padded_row
    for size in sizes:
        for with_prefix in (False, True)[: 1 + (size >= 8)]:
            graphs._forward_batch(size, cascade=with_prefix)
