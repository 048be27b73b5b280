"""The steps that no other outgrows, which are run to see how much memory steps take."""

from paged.blocks import TableChange, blocks_for
from paged.config import EngineConfig
from paged.sampling_params import SamplingParams
from paged.step import Admission, RowPlan, Sample, Step
from paged.step_draft import MOST_PROMPT_TARGETS


def largest_steps(config: EngineConfig) -> tuple[Step, Step]:
    """Two Steps that no other outgrows: prompts that fill the token budget, and decodes of sequences at full length.

    Both wish for all that takes memory: log probabilities, as many as requests may have, the prompts those of their own
    tokens too; penalties, which keep counts of every token; allowed tokens, which keep a mask. (A beam search may want
    more log probabilities than that; and blocks are copied and swapped before a step, through memory that it takes
    anew.)

    All block tables name block 1 alone, so that a pool of three blocks is enough to run them: what they compute is of
    no use, what memory they take is.
    """
    length, budget = config.max_model_len, config.max_num_batched_tokens
    assert length is not None, "filled in when the model was loaded"
    assert budget is not None, "filled in when the model was loaded"
    table = TableChange(0, (1,) * blocks_for(length, config.block_size))
    # The sampling that takes the most memory: it sorts, while what penalties and masks read is still there.
    most = config.max_logprobs
    params = SamplingParams(
        temperature=1,
        top_k=2,
        top_p=0.5,
        min_p=0.1,
        presence_penalty=1,
        allowed_token_ids=[0],
        logprobs=most,
        prompt_logprobs=most,
    )
    admissions = tuple(Admission(row, params, seed=0) for row in range(config.max_num_seqs))

    def row(index: int, num_tokens: int) -> RowPlan:
        """The last tokens of a sequence, which see all of it."""
        return RowPlan(str(index), 0, index, length - num_tokens, (0,) * num_tokens, table, samples=(Sample(index),))

    sizes = [min(length, budget - first) for first in range(0, budget, length)][: config.max_num_seqs]
    prompts = tuple(row(index, size) for index, size in enumerate(sizes))
    num_targets = min(MOST_PROMPT_TARGETS, sizes[0])
    prompts = (prompts[0]._replace(prompt_targets=(0,) * num_targets), *prompts[1:])
    decodes = tuple(row(index, 1) for index in range(config.max_num_seqs))
    # Rows with a single token come first, as in every Step.
    prompts = tuple(sorted(prompts, key=lambda row: len(row.token_ids) > 1))
    return Step(prompts, admissions), Step(decodes, admissions)
