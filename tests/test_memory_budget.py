"""From measured numbers to the pool's size, the ledger and the errors; and on a GPU, the ledger against PyTorch."""

import gc
import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from helpers import as_prompts, load, tokens_of
from hypothesis import given
from hypothesis import strategies as st

from paged import LLM, SamplingParams
from paged.config import EngineConfig
from paged.kv_pool import LayerShape, allocate_layer, bytes_per_block, storage_bytes
from paged.model import loading, memory_profile
from paged.model.largest_steps import largest_steps
from paged.model.memory_budget import (
    OVERHEAD_BLOCKS,
    check_share_is_free,
    most_blocks_for_flex,
    num_blocks_for,
)
from paged.model.memory_ledger import open_ledger
from paged.model.memory_profile import PAGE, DeviceMemory, MemoryNeeds, measure_needs, needs_between

GIB = 2**30
LAYERS = [LayerShape(8, 128, 128)] * 32
BLOCK = 2 * 2**20  # bytes of a block of 16 tokens in bfloat16
START = DeviceMemory(name="GPU", total=80 * GIB, free=79 * GIB, allocated=0, reserved=0)


def config_of(**settings):
    settings = {"max_model_len": 8192, "max_num_batched_tokens": 4096, **settings}
    return EngineConfig(model="tiny", **settings)


def needs_of(**sizes):
    """Needs on a GPU of 80 GiB, 79 free; sizes in GiB."""
    given = {"total": 80, "free_at_start": 79, "weights": 16, "activations": 2, **sizes}
    return MemoryNeeds(device="GPU", **{name: int(size * GIB) for name, size in given.items()})


def blocks_of(config, needs, **arguments):
    return num_blocks_for(config, LAYERS, torch.bfloat16, needs, **arguments)


# --- the pool's size --------------------------------------------------------------------------------------------------


def test_the_pool_gets_what_the_share_leaves_beside_everything_else():
    needs = needs_of(fragmentation=0.25, outside_torch=0.5, buffers=0.25, graphs=1)
    assert blocks_of(config_of(gpu_memory_utilization=0.5), needs) == 20 * GIB // BLOCK
    # What others hold does not count against the share: as long as that much was free, it is this engine's.
    assert blocks_of(config_of(gpu_memory_utilization=0.5), replace(needs, free_at_start=41 * GIB)) == 20 * GIB // BLOCK


def test_the_pool_is_no_larger_than_its_users_or_what_flex_reaches():
    config = config_of(max_num_seqs=2, gpu_memory_utilization=0.5)
    assert blocks_of(config, needs_of()) == 2 * 512 + OVERHEAD_BLOCKS
    assert blocks_of(config, needs_of(), most_blocks=600) == 600
    assert blocks_of(config, needs_of(), most_blocks=6000) == 2 * 512 + OVERHEAD_BLOCKS


@pytest.mark.parametrize("shape", [(8, 128, 128), (1, 1, 1), (3, 192, 128), (2, 64, 80), (128, 256, 512)], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_flex_reaches_less_than_two_to_the_31_numbers(shape, block_size):
    layers = [LayerShape(1, 1, 1), LayerShape(*shape), LayerShape(1, 1, 1)]
    most = most_blocks_for_flex(layers, block_size)
    on_meta = [allocate_layer(LayerShape(*shape), n, block_size, torch.int8, "meta") for n in (most, most + 1)]
    fitting, too_many = (max(tensor.numel() for tensor in cache) for cache in on_meta)
    assert fitting < 2**31 <= too_many


@pytest.mark.parametrize("setting", ["num_gpu_blocks_override", "kv_cache_memory_bytes"])
def test_a_given_size_is_taken_as_it_is_or_refused(setting):
    def given(blocks, most_blocks=None, **sizes):
        size = blocks if setting == "num_gpu_blocks_override" else blocks * BLOCK + 5
        # A share of a thousandth: it must not matter.
        config = config_of(**{setting: size, "gpu_memory_utilization": 0.001})
        return blocks_of(config, needs_of(**sizes), most_blocks=most_blocks)

    assert given(600) == 600
    assert given(600, most_blocks=600) == 600
    with pytest.raises(ValueError, match=rf"^{setting}=\d+ makes 601 blocks, .* 32 bits, reaches at most 600 \("):
        given(601, most_blocks=600)
    # 61 of the 79 GiB that were free are left.
    assert given(61 * 512) == 61 * 512
    with pytest.raises(ValueError, match=r"61\.00 GiB, and of the 79\.00 GiB .* leaves room for 31,232 blocks"):
        given(61 * 512 + 1)
    with pytest.raises(ValueError, match="leaves room for 0 blocks"):
        given(600, activations=70)


# --- the two errors ---------------------------------------------------------------------------------------------------


def advised(message: str, pattern: str) -> float:
    """A number that an error advises."""
    found = re.search(pattern, message)
    assert found, message
    return float(found[1])


RAISE_TO = r"aise gpu_memory_utilization to at least ([\d.]+)"


@given(
    total=st.integers(10**9, 10**12),
    taken=st.floats(0.01, 1.2),
    utilization=st.floats(0.01, 1),
    free=st.floats(0.5, 1),
    length=st.integers(1, 200_000),
)
def test_what_the_errors_advise_is_enough(total, taken, utilization, free, length):
    """Whatever the numbers: the share that is advised holds max_model_len, and the length that is advised fits."""
    needs = MemoryNeeds(
        device="GPU", total=total, free_at_start=int(total * free), weights=int(total * taken * 0.7),
        activations=int(total * taken * 0.3),
    )  # fmt: skip
    config = config_of(gpu_memory_utilization=utilization, max_model_len=length)
    left = int(total * utilization) - needs.together
    least = -(-length // 16) + OVERHEAD_BLOCKS
    if left // BLOCK >= least:
        assert least <= blocks_of(config, needs) <= left // BLOCK
        return
    with pytest.raises(ValueError, match=r"max_model_len|no room") as caught:
        blocks_of(config, needs)
    message = str(caught.value)
    if "aise gpu_memory_utilization" in message:
        share = advised(message, RAISE_TO)
        assert utilization < share <= 1
        assert int(total * share) <= needs.free_at_start
        assert blocks_of(replace(config, gpu_memory_utilization=share), needs) >= least
    else:
        assert "ake a GPU with" in message
        # What is needed is not free, but for the share's being rounded up to a thousandth.
        assert needs.together + least * BLOCK > needs.free_at_start - total // 1000 - 2
    assert ("no room" in message) == (left < (OVERHEAD_BLOCKS + 1) * BLOCK)
    if "no room" not in message:
        fitting = int(advised(message, r"et max_model_len to at most (\d+)"))
        assert blocks_of(replace(config, max_model_len=fitting), needs) >= fitting // 16 + OVERHEAD_BLOCKS
        with pytest.raises(ValueError, match=f"at most {fitting}"):
            blocks_of(replace(config, max_model_len=fitting + 1), needs)


def test_no_room_at_all_says_the_numbers_and_what_to_change():
    needs = needs_of(outside_torch=0.5, graphs=1.5)
    with pytest.raises(ValueError, match="no room for the pool") as caught:
        blocks_of(config_of(gpu_memory_utilization=0.2), needs)
    assert str(caught.value) == (
        "no room for the pool: weights (16.00 GiB), activations of the largest step (2.00 GiB), kernels and libraries "
        "(outside PyTorch) (0.50 GiB), CUDA graphs (1.50 GiB) take 20.00 GiB, 4.00 GiB more than the 16.00 GiB that "
        "gpu_memory_utilization=0.2 allows of the 80.00 GiB of GPU. Raise gpu_memory_utilization to at least 0.263, or "
        "lower max_num_batched_tokens=4096 or max_num_seqs=256, or use a smaller model or dtype"
    )
    with pytest.raises(ValueError, match=r"4\.0 MiB are left of the 20\.00 GiB .* in a byte a number"):
        blocks_of(config_of(gpu_memory_utilization=0.25), replace(needs, graphs=int(1.5 * GIB) - 2 * BLOCK))
    with pytest.raises(ValueError, match=r"Take a GPU with 81\.00 GiB free \(this one had 79\.00 GiB at start\)"):
        blocks_of(config_of(), needs_of(weights=78))


def test_a_length_that_does_not_fit_says_which_would():
    with pytest.raises(ValueError, match="max_model_len=65536") as caught:
        blocks_of(config_of(gpu_memory_utilization=0.25, max_model_len=65536), needs_of())
    message = str(caught.value)
    # 2 GiB are 1,024 blocks of 2 MiB, of which 1,022 hold 16 tokens each.
    assert "takes 4,096 blocks of 2,097,152 bytes, and with the null and the trash block 8,594,128,896 bytes" in message
    assert "gpu_memory_utilization=0.25 of 80.00 GiB leaves 2,147,483,648 beside weights (16.00 GiB), activ" in message
    assert "Set max_model_len to at most 16352, or raise gpu_memory_utilization to at least 0.326, or lower" in message
    with pytest.raises(ValueError, match=r"flex|Flex.*reaches 500 blocks\. Set max_model_len to at most 7968, or use"):
        blocks_of(config_of(), needs_of(), most_blocks=500)


def test_a_share_that_others_hold_is_refused_at_start():
    check_share_is_free(config_of(gpu_memory_utilization=0.5), replace(START, free=40 * GIB))
    with pytest.raises(ValueError, match=r"0\.5 of the 80\.00 GiB of GPU is 40\.00 GiB, and 30\.00 GiB are free") as e:
        check_share_is_free(config_of(gpu_memory_utilization=0.5), replace(START, free=30 * GIB))
    assert "hold 50.00 GiB. Set it to at most 0.375, or end what" in str(e.value)
    check_share_is_free(config_of(gpu_memory_utilization=0.375), replace(START, free=30 * GIB))
    # Where the size was given the share is not asked for, and a CPU has none.
    check_share_is_free(config_of(kv_cache_memory_bytes=10**9), replace(START, free=30 * GIB))
    check_share_is_free(config_of(num_gpu_blocks_override=10), replace(START, free=30 * GIB))
    check_share_is_free(config_of(), None)


def test_largest_steps_that_do_not_fit_the_gpu_are_an_error_with_advice(monkeypatch):
    def run_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        ValueError, match=r"of 80\.00 GiB, 79\.00 GiB were free .*batched_tokens=4096 and max_num_seqs="
    ):
        measure_needs(
            config_of(), torch.device("cpu"), START, weights=[], buffers=0, block_bytes=1, num_pool_tensors=2,
            run_largest_steps=run_out_of_memory, warm_up=lambda: None,
        )  # fmt: skip


# --- what is measured -------------------------------------------------------------------------------------------------


class FakeGpu:
    """PyTorch's and the driver's counters of a GPU on which the second run of the largest steps takes less.

    The first one compiles. Between the two everything unused is given back.
    """

    def __init__(self, monkeypatch):
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.outside, self.runs = GIB, 0
        for name, value in {
            "synchronize": lambda device: None,
            "empty_cache": self.empty_cache,
            "mem_get_info": lambda device: (80 * GIB - self.reserved - self.outside, 80 * GIB),
            "get_device_name": lambda device: "GPU",
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_allocated": lambda device: self.peak_allocated,
            "max_memory_reserved": lambda device: self.peak_reserved,
            "reset_peak_memory_stats": self.reset,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def empty_cache(self):
        self.reserved = self.allocated

    def reset(self, device):
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def take(self, stays, peak, holes):
        """Allocate bytes that stay, and others that are given back."""
        self.peak_allocated = max(self.peak_allocated, self.allocated + stays + peak)
        self.allocated += stays
        self.reserved = max(self.reserved, self.allocated + peak + holes)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def run_largest_steps(self):
        self.runs += 1
        self.outside += GIB // 2 if self.runs == 1 else 0  # kernels are loaded
        stays = 300 if self.runs == 1 else 0  # the trial pool of 3 * 100
        self.take(stays, peak=7 * GIB if self.runs == 1 else 5 * GIB + 11, holes=17)

    def warm_up(self):
        assert self.runs == 1, "kernels are tuned before anything is measured"
        self.take(0, peak=9 * GIB, holes=5)


def test_needs_are_read_from_the_second_run(monkeypatch):
    gpu, device = FakeGpu(monkeypatch), torch.device("cuda")
    gpu.take(1000, peak=50, holes=0)  # somebody else's tensors, in this process
    start = memory_profile.snapshot(device)
    assert (start.allocated, start.reserved, start.free) == (1000, 1000, 79 * GIB - 1000)
    weights = [torch.zeros(100), torch.zeros(10)]
    gpu.take(440, peak=0, holes=0)
    needs = measure_needs(
        config_of(), device, start, weights=[*weights, weights[0]], buffers=11, block_bytes=100, num_pool_tensors=4,
        run_largest_steps=gpu.run_largest_steps, warm_up=gpu.warm_up,
    )  # fmt: skip
    assert gpu.runs == 2
    assert needs == MemoryNeeds(
        device="GPU", total=80 * GIB, free_at_start=79 * GIB - 1000, weights=440, activations=5 * GIB,
        fragmentation=17 + 4 * PAGE, outside_torch=GIB // 2, buffers=11,
    )  # fmt: skip
    assert memory_profile.snapshot(torch.device("cpu")) is None


def test_memory_that_others_let_go_is_never_a_negative_need():
    needs = needs_between(
        replace(START, allocated=500, reserved=900), peak_allocated=600, peak_reserved=900, outside_torch=0,
        weights=200, buffers=0, trial_pool=0, num_pool_tensors=0,
    )  # fmt: skip
    assert (needs.activations, needs.fragmentation, needs.outside_torch) == (0, 0, 0)


def test_what_the_largest_steps_leave_on_the_device_is_reserved_and_let_go(folders):
    """The bytes that are reserved for rows' wishes, against those of the tensors that the largest steps leave."""
    settings = {"max_model_len": 32, "max_num_seqs": 5, "max_num_batched_tokens": 64}
    engine = load(folders["llama"], **settings, num_gpu_blocks_override=4).engine
    for step in largest_steps(engine.config):
        engine.runner.run(step)
    builder = engine.runner._builder
    wishes = builder._wishes
    kept = [wishes._counts.prompt_seen, wishes._counts.output_counts, *wishes._allowed.values()]
    assert storage_bytes(kept) == builder.sampling_state_bytes == 5 * 128 * 6
    assert builder._block_tables.any()
    builder.reset()
    assert builder._wishes._counts is None
    assert not builder._wishes._allowed
    assert not builder._block_tables.any()


def test_an_engine_measures_before_it_allocates(folders, monkeypatch):
    """The way of a GPU, all but its counters: the largest steps run, leave nothing, and the share decides."""
    FakeGpu(monkeypatch).outside += 2**19  # loaded kernels
    monkeypatch.setattr(loading, "snapshot", lambda device: START)
    settings = {"max_model_len": 64, "max_num_batched_tokens": 128, "max_num_seqs": 100, "block_size": 16}
    llm = load(folders["llama"], **settings, gpu_memory_utilization=0.00014)
    runner, ledger = llm.engine.runner, llm.memory_ledger
    size = bytes_per_block([LayerShape(2, 16, 16)] * 2, 16, torch.float32)
    last_tokens = (100 + 1) * 8  # of each row, and of padding
    rest = ledger.weights + 100 * 128 * 6 + last_tokens + 2 * 2 * PAGE + 2**19
    assert ledger.total_used - ledger.kv_pool == rest
    assert runner.num_blocks == (int(80 * GIB * 0.00014) - rest) // size < 100 * 4
    assert ledger.host_block_tables == 100 * 4 * 4
    assert runner._builder._wishes._counts is None, "the largest steps' counts were let go"
    prompt = as_prompts([[5, 6, 7]])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert tokens_of(llm.generate(prompt, params)) == tokens_of(load(folders["llama"]).generate(prompt, params))
    monkeypatch.setattr(loading, "snapshot", lambda device: replace(START, free=5 * GIB))
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization=0\.9 of the 80\.00 GiB of GPU is 72\.00 GiB, and 5\.00"
    ):
        load(folders["llama"])


# --- the ledger -------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 4 * GIB), min_size=6, max_size=6),
    utilization=st.floats(0.4, 0.98),
    given_size=st.sampled_from([{}, {"num_gpu_blocks_override": 700}, {"kv_cache_memory_bytes": 3 * GIB}]),
    graphs_measured=st.none() | st.integers(0, 60 * GIB),
)
def test_the_lines_sum_to_the_budget(sizes, utilization, given_size, graphs_measured):
    names = ("weights", "activations", "fragmentation", "outside_torch", "buffers", "graphs")
    needs = MemoryNeeds(device="GPU", total=80 * GIB, free_at_start=79 * GIB, **dict(zip(names, sizes, strict=True)))
    config = config_of(gpu_memory_utilization=utilization, **given_size)
    num_blocks = blocks_of(config, needs)
    ledger = open_ledger(config, needs, num_blocks=num_blocks, kv_pool=num_blocks * BLOCK)
    assert ledger.budget == (79 * GIB if given_size else int(80 * GIB * utilization))
    assert ledger.unused >= 0
    assert ledger.graphs == needs.graphs
    if graphs_measured is not None:
        ledger = ledger.with_graphs(graphs_measured)
        assert ledger.graphs == graphs_measured
    assert ledger.graphs_reserved == needs.graphs
    assert sum(ledger.lines.values()) == ledger.budget
    assert ledger.total_used == sum(sizes[:5]) + ledger.graphs + num_blocks * BLOCK == ledger.budget - ledger.unused
    assert ledger.most_allocated == sizes[0] + sizes[1] + sizes[4] + ledger.graphs + num_blocks * BLOCK
    assert json.loads(json.dumps(ledger.to_dict()))["lines"] == ledger.lines


def table_of(ledger) -> dict[str, tuple[float, float]]:
    """The lines of a printed ledger: name -> (GiB, per cent)."""
    found = re.findall(r"(?m)^  (\S.*?) +(-?[\d.,]+) +(-?[\d.]+)$", str(ledger))
    return {name: (float(size.replace(",", "")), float(percent)) for name, size, percent in found}


def test_the_printed_table_is_the_lines():
    needs = needs_of(graphs=1, buffers=0.5)
    config = config_of(gpu_memory_utilization=0.5)
    ledger = open_ledger(config, needs, num_blocks=3000, kv_pool=3000 * BLOCK, host_swap_pool=4 * GIB)
    pool = 3000 * BLOCK / GIB
    assert table_of(ledger) == {
        "weights": (16, 40),
        "activations of the largest step": (2, 5),
        "persistent buffers": (0.5, 1.2),
        "CUDA graphs (reserved)": (1, 2.5),
        "KV pool": (round(pool, 3), round(pool / 40 * 100, 1)),
        "unused": (round(20.5 - pool, 3), round((20.5 - pool) / 40 * 100, 1)),
        "together": (40, 100),
    }
    after = table_of(ledger.with_graphs(16 * GIB))
    assert after["CUDA graphs (reserved: 1.000 GiB)"] == (16, 40)
    assert after["over the budget"][0] == round(5.5 - pool, 3) < 0
    text = str(ledger)
    assert text.startswith("Memory of GPU (80.00 GiB), pool sized by gpu_memory_utilization=0.5 ")
    assert "Beside it: 1.000 GiB in use when the engine started\nOn the host: swap pool 4.000 GiB\n" in text
    assert text.endswith("2 of them null and trash: 47,968 tokens, or 5.8 sequences of 8,192 tokens")
    assert len({len(line) for line in text.splitlines()[:8]}) == 1, "the columns are aligned"


def test_the_ledger_says_what_capped_the_pool():
    config, needs = config_of(gpu_memory_utilization=0.5, max_num_seqs=2), needs_of()
    notes = {n: open_ledger(config, needs, num_blocks=n, kv_pool=n, most_blocks=900).notes for n in (899, 900, 1026)}
    assert notes[899] == ()
    assert notes[900] == ("FlexAttention indexes with 32 bits: it reaches no more than 900 blocks",)
    assert notes[1026] == ("max_num_seqs=2 sequences of max_model_len=8192 fill no more",)


def test_an_engine_has_its_ledger_and_logs_it_once(folders, caplog):
    with caplog.at_level(logging.INFO, logger="paged"):
        llm = load(
            folders["llama"], max_model_len=64, max_num_seqs=3, block_size=16, preemption_mode="swap", swap_space=0.001
        )
    ledger, runner = llm.memory_ledger, llm.engine.runner
    assert [record.getMessage() for record in caplog.records if "Memory of" in record.getMessage()] == [str(ledger)]
    model = runner._model
    assert ledger.weights == sum(parameter.nbytes for parameter in model.parameters()) + sum(
        buffer.nbytes for name, buffer in model.named_buffers() if not name.endswith("_cache")
    )
    assert ledger.kv_pool == runner.kv_cache_bytes == runner.num_blocks * bytes_per_block(
        [LayerShape(2, 16, 16)] * 2, 16, torch.float32
    )  # fmt: skip
    assert ledger.needs.buffers == 3 * 128 * 6 + 3 * 4 * 4
    assert ledger.host_swap_pool == runner.num_host_blocks * ledger.kv_pool // runner.num_blocks > 0
    assert (ledger.device, ledger.unused, ledger.num_tokens) == ("cpu", 0, 3 * 64)
    assert ledger.num_full_sequences == 3
    assert sum(ledger.lines.values()) == ledger.budget == ledger.total_used
    assert ledger.notes[0] == "activations are not measured on a CPU"
    assert "pool sized by the default of a CPU" in str(ledger)


# --- on a GPU, against PyTorch ----------------------------------------------------------------------------------------


SIZED_BY = {
    "share": {},
    "blocks": {"num_gpu_blocks_override": 5000},
    "bytes": {"kv_cache_memory_bytes": 2 * GIB},
    "int8": {"kv_cache_dtype": "int8"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("sized_by", SIZED_BY)
def test_no_more_is_allocated_than_the_ledger_says(sized_by, eager):
    """Serve batches that fill rows, budget and pool, with every wish that takes memory."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()  # an earlier engine's cuBLAS keeps its workspace
    _, total = torch.cuda.mem_get_info()
    llm = LLM(
        model="tiny", device="cuda", dtype="float32", enforce_eager=eager, max_num_seqs=512,
        gpu_memory_utilization=4 * GIB / total, **SIZED_BY[sized_by],
    )  # fmt: skip
    ledger = llm.memory_ledger
    assert ledger.kv_pool == llm.engine.runner.kv_cache_bytes
    assert ledger.activations > 0
    assert sum(ledger.lines.values()) == ledger.budget
    assert ledger.unused >= 0
    wishes = {"logprobs": 20, "prompt_logprobs": 20, "presence_penalty": 1.0, "allowed_token_ids": list(range(300))}
    for length, more in ((1000, {}), (3, wishes), (100, wishes), (900, {"frequency_penalty": 0.5})):
        params = SamplingParams(temperature=1, top_p=0.9, min_p=0.01, max_tokens=24, ignore_eos=True, **more)
        prompts = [[5 + i % 250] * length for i in range(600)]
        outputs = llm.generate(as_prompts(prompts), params)
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * ledger.most_allocated <= 1.02 * ledger.total_used
    # Nor is the ledger padded.
    assert torch.cuda.max_memory_allocated() - before >= 0.5 * ledger.most_allocated


@pytest.mark.gpu
def test_a_gpu_without_room_is_refused_with_the_numbers():
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    with pytest.raises(ValueError, match=r"no room for the pool: weights .* Raise gpu_memory_utilization") as caught:
        LLM(model="tiny", device="cuda", gpu_memory_utilization=2**20 / total)
    share = advised(str(caught.value), RAISE_TO)
    assert LLM(model="tiny", device="cuda", gpu_memory_utilization=share).memory_ledger.num_full_sequences >= 1
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.empty(free // 4, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.9 of the .* are free"):
        LLM(model="tiny", device="cuda")
    del held
