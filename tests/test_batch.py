"""A Step as tensors, against the same things worked out one token at a time in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.batch import BatchBuilder
from paged.blocks import TableChange, blocks_for
from paged.request import Request
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler
from paged.step import Admission, RowPlan, Sample, Step

VOCAB = 50


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(0, 10),
    st.booleans(),
)
def test_every_tensor_of_every_step(block_size, lengths, spare, fine_groups):
    """Drive the scheduler through whole runs, preemptions included, and look every number up by hand."""
    most = max(blocks_for(n + m - 1, block_size) for n, m in lengths)
    s = Scheduler(
        num_blocks=2 + most + spare,
        block_size=block_size,
        max_num_seqs=4,
        max_num_batched_tokens=30,
        spare_blocks_per_seq=0,
    )
    builder = BatchBuilder(
        max_num_seqs=4,
        max_model_len=32,
        block_size=block_size,
        vocab_size=VOCAB,
        device="cpu",
        fine_groups=fine_groups,
    )
    requests = {}
    for i, (prompt, max_tokens) in enumerate(lengths):
        params = SamplingParams(temperature=i / 10, top_k=i, top_p=1 - i / 10, max_tokens=max_tokens)
        requests[str(i)] = Request(
            str(i), range(prompt), params, block_table=s.new_block_table(), seed=i * 7, max_tokens=max_tokens
        )
        s.add(requests[str(i)])
    while (step := s.schedule()) is not None:
        batch = builder.build(step)
        attention = batch.attention
        token = 0
        rows = [(g, b) for g, group in enumerate(attention.groups) for b in range(len(group.seq_lens))]
        assert len(rows) == len(step.rows)
        num_prompts = len(step.rows) - step.num_single
        if fine_groups:
            assert all(len(group.seq_lens) == 1 for group in attention.groups if group.max_query_len > 1)
        else:
            assert len(attention.groups) == (step.num_single > 0) + (num_prompts > 0)
        for (g, b), row in zip(rows, step.rows, strict=True):
            group = attention.groups[g]
            table = requests[row.request_id].sequences[0].block_table
            assert (group.max_query_len == 1) == (len(row.token_ids) == 1)
            assert group.seq_lens[b] == row.end
            assert group.start + group.query_start_loc[b] == token
            width = group.block_tables.shape[1]
            assert group.block_tables[b].tolist() == (table.blocks + [0] * width)[:width]
            assert len(table.blocks) <= width
            for position, token_id in zip(range(row.start, row.end), row.token_ids, strict=True):
                assert batch.token_ids[token] == token_id
                assert batch.positions[token] == position
                assert attention.slot_mapping[token] == table.slot(position)
                token += 1
            assert group.query_start_loc[b + 1] + group.start == token
        assert len(batch.token_ids) == token == step.num_tokens
        ends = torch.tensor([len(row.token_ids) for row in step.rows]).cumsum(0) - 1
        sampling_rows = [row for row in step.rows if row.samples]
        assert batch.sampled.tolist() == [end for end, row in zip(ends.tolist(), step.rows, strict=True) if row.samples]
        assert batch.sampled_rows.tolist() == [row.row for row in sampling_rows]
        wishes = [requests[row.request_id].sampling_params for row in sampling_rows]
        sampling = batch.sampling
        assert sampling.temperature.tolist() == pytest.approx([w.temperature for w in wishes])
        assert sampling.top_p.tolist() == pytest.approx([w.top_p for w in wishes])
        assert sampling.top_k.tolist() == [VOCAB if w.top_k == 0 else w.top_k for w in wishes]
        assert sampling.seeds.tolist() == [requests[row.request_id].seed for row in sampling_rows]
        assert sampling.positions.tolist() == [row.end for row in sampling_rows]
        assert sampling.all_greedy == all(w.greedy for w in wishes)
        assert sampling.any_truncated == any(w.top_k or w.top_p < 1 for w in wishes)
        s.update(step, [1] * len(sampling_rows))


def test_a_token_that_the_host_does_not_know_is_the_one_sampled_last_for_its_row():
    builder = BatchBuilder(max_num_seqs=4, max_model_len=16, block_size=4, vocab_size=VOCAB, device="cpu")
    tables = [TableChange(0, (row + 1,)) for row in range(3)]
    samples = [(Sample(row),) for row in range(3)]
    admissions = tuple(Admission(row, SamplingParams(), 0) for row in range(3))
    prompts = [RowPlan(str(i), 0, i, 0, (5, 6), tables[i], samples[i]) for i in range(2)]
    first = builder.build(Step(tuple(prompts), admissions))
    builder.count(first, torch.tensor([21, 22]))
    decodes = [RowPlan("1", 0, 1, 2, (None,), None, samples[1]), RowPlan("0", 0, 0, 2, (9,), None, samples[0])]
    prompt = RowPlan("2", 0, 2, 0, (7, 8), tables[2], samples[2])
    second = builder.build(Step((*decodes, prompt)))
    assert second.token_ids.tolist() == [22, 9, 7, 8]
    builder.count(second, torch.tensor([31, 32, 33]))
    third = builder.build(
        Step(tuple(RowPlan(str(i), 0, i, 3, (None,), None, samples[i]) for i in (2, 0, 1)), admissions[:0])
    )
    assert third.token_ids.tolist() == [33, 32, 31]


def test_decodes_of_about_the_same_length_are_grouped():
    """Down to half of each group's longest, and all from 64 on."""
    lengths = [5000, 900, 300, 190, 100, 60, 30, 3]
    for fine_groups, expected in ((True, [[5000], [900], [300, 190], [100, 60], [30, 3]]), (False, [lengths])):
        builder = BatchBuilder(
            max_num_seqs=8, max_model_len=8192, block_size=16, vocab_size=VOCAB, device="cpu", fine_groups=fine_groups
        )
        rows = tuple(
            RowPlan(str(i), 0, i, n - 1, (1,), TableChange(0, (1,) * blocks_for(n, 16)), (Sample(i),))
            for i, n in enumerate(lengths)
        )
        admissions = tuple(Admission(i, SamplingParams(), 0) for i in range(8))
        batch = builder.build(Step(rows, admissions))
        assert [group.seq_lens.tolist() for group in batch.attention.groups] == expected
        assert [group.block_tables.shape[1] for group in batch.attention.groups] == [
            blocks_for(max(group), 16) for group in expected
        ]
