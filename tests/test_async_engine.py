"""Streams: the same tokens as without them, pieces as they come, and nothing left behind by whoever leaves."""

import asyncio

import pytest
from helpers import as_prompts, load, token_prompts, tokens_of

from paged import SamplingParams
from paged.async_engine import AsyncEngine
from paged.sampling_params import RequestOutputKind

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


async def collect(engine: AsyncEngine, name: str, prompt: list[int], most: int | None = None) -> list[int]:
    """The tokens of a stream, left after `most` outputs."""
    tokens: list[int] = []
    stream = engine.stream(name, prompt, GREEDY)
    async for output in stream:
        tokens += output.outputs[0].token_ids
        if most is not None and len(tokens) >= most:
            await stream.aclose()
            break
    return tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_streams_beside_each_other_are_what_generate_gives(device, folders):
    llm = load(folders["llama"], device=device, block_size=4, num_gpu_blocks_override=20)
    prompts = token_prompts([5, 17, 30])
    expected = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    engine = AsyncEngine(llm.engine)

    async def run():
        streams = [collect(engine, str(i), prompt) for i, prompt in enumerate(prompts)]
        first = await asyncio.gather(*streams)
        return first, await collect(engine, "later", prompts[0])  # the runner starts again

    together, later = asyncio.run(run())
    assert together == expected
    assert later == expected[0]


def test_whoever_leaves_is_aborted_and_others_go_on(folders):
    llm = load(folders["llama"])
    prompts = token_prompts([5, 17])
    expected = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    engine = AsyncEngine(llm.engine)

    async def run():
        left, stayed = await asyncio.gather(
            collect(engine, "left", prompts[0], most=3), collect(engine, "stayed", prompts[1])
        )
        cancelled = asyncio.create_task(collect(engine, "cancelled", prompts[0]))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return left, stayed

    left, stayed = asyncio.run(run())
    assert left == expected[0][:3]
    assert stayed == expected[1]
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable


def test_errors_reach_their_streams(folders, monkeypatch):
    llm = load(folders["llama"])
    engine = AsyncEngine(llm.engine)

    async def bad():
        with pytest.raises(ValueError, match="empty prompt"):
            await collect(engine, "empty", [])
        monkeypatch.setattr(llm.engine.scheduler, "update", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await collect(engine, "a", [1, 2])

    asyncio.run(bad())
    assert not llm.engine.has_unfinished_requests
