"""The engine for many callers at once: each awaits its own outputs, and one task runs the steps for all of them.

    async for output in engine.stream("a", "To be, or", SamplingParams(output_kind=RequestOutputKind.DELTA)):
        print(output.outputs[0].text, end="")

A step runs in a thread, so that the event loop answers others meanwhile. Requests come and go between steps only: a
lock stands for "a step is under way", and whoever adds or aborts waits for it, a step at most.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import SupportsIndex

from paged.engine import Engine
from paged.outputs import RequestOutput
from paged.sampling_params import BeamSearchParams, SamplingParams


class AsyncEngine:
    """An engine whose requests are streams.

    Args:
        engine: it belongs to this object from now on; nobody else may step it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._between_steps = asyncio.Lock()
        self._queues: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._runner: asyncio.Task[None] | None = None

    async def stream(
        self,
        request_id: str,
        prompt: str | Iterable[SupportsIndex],
        sampling_params: SamplingParams | BeamSearchParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Queue a request and yield its outputs until it ends; leaving early aborts it.

        Args:
            request_id, prompt, sampling_params, priority, cache_salt: as in `Engine.add_request`.

        Raises:
            ValueError: as in `Engine.add_request`, when the first output is asked for.
        """
        queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        async with self._between_steps:
            self.engine.add_request(request_id, prompt, sampling_params, priority=priority, cache_salt=cache_salt)
            self._queues[request_id] = queue
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        finished = False
        try:
            while not finished:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise output
                finished = output.finished
                yield output
        finally:
            del self._queues[request_id]
            if not finished:
                async with self._between_steps:
                    self.engine.abort_request(request_id)

    async def _run(self) -> None:
        """Run steps until nobody is left. A fault in the bookkeeping reaches everybody who waits."""
        while self.engine.has_unfinished_requests:
            async with self._between_steps:
                try:
                    outputs = await asyncio.to_thread(self.engine.step)
                except Exception as error:
                    for queue in self._queues.values():
                        queue.put_nowait(error)
                    return
            for output in outputs:
                if output.request_id in self._queues:
                    self._queues[output.request_id].put_nowait(output)
