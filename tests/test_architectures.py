"""Every architecture against transformers' `generate`: token for token, in float32, from a pool that runs out."""

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, build
from helpers import as_prompts, generate, load, token_prompts, tokens_of

from paged import SamplingParams

NUM_TOKENS = 20


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_equal_transformers_generate(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    prompts = token_prompts([2, 5, 17, 40])
    llm = load(tmp_path, block_size=4, num_gpu_blocks_override=20, max_num_seqs=4, max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    tokens = tokens_of(llm.generate(as_prompts(prompts), params))
    expected = [generate(model, prompt, NUM_TOKENS) for prompt in prompts]
    assert tokens == expected
    # Where every layer has a window, blocks are freed so early that the pool does not run out.
    assert llm.engine.scheduler.num_preemptions > 0 or llm.engine.scheduler.kv.sliding_window is not None
    assert len({token for tokens in expected for token in tokens}) > 9, "a model that repeats itself would hide faults"


def test_the_documentation_names_each_of_them():
    page = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
    assert [name for name in ARCHITECTURES if f"`{name.split('-')[0]}`" not in page] == []
