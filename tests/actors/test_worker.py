"""The worker: an engine in its own thread behind an asyncio interface."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest

from actors.config import EngineConfig
from actors.requests import Completion, EngineError, Request, SamplingParams
from actors.streamed_text import Detokenizer, StreamedText
from actors.worker import EngineWorker


@pytest.fixture(scope="module")
def worker(tiny_llama):
    worker = EngineWorker(EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1))
    yield worker
    worker.close()


def requests_of(count, *, max_tokens=6, prefix="r"):
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [Request(f"{prefix}{i}", [1, 5 + i % 7, 9, 2 + i % 3], sampling, seed=i) for i in range(count)]


def test_completions_come_in_the_order_of_the_requests(worker):
    requests = requests_of(9)
    completions = asyncio.run(worker.generate(requests))
    assert [c.request_id for c in completions] == [r.request_id for r in requests]
    assert all(len(c.outputs[0].token_ids) == 6 for c in completions)


def test_calls_at_the_same_time_share_the_engine_even_with_equal_ids(worker):
    async def run():
        steps = worker.stats().num_steps
        answers = await asyncio.gather(*(worker.generate(requests_of(4)) for _ in range(5)))
        return answers, worker.stats().num_steps - steps

    answers, num_steps = asyncio.run(run())
    texts = [[c.outputs[0].token_ids for c in answer] for answer in answers]
    assert all(text == texts[0] for text in texts)
    assert num_steps < 5 * 6, "five calls one after another would take 30 steps"


def test_an_id_used_twice_in_one_call_is_answered_twice(worker):
    request = requests_of(1)[0]
    completions = asyncio.run(worker.generate([request, replace(request)]))
    assert [c.request_id for c in completions] == ["r0", "r0"]


def test_busy_time_is_exactly_what_rows_were_charged(tiny_llama):
    worker = EngineWorker(EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1))
    completions = asyncio.run(worker.generate(requests_of(7)))
    stats = worker.stats()
    worker.close()
    charged_ns = sum(round(c.usage.device_seconds * 1e9) for c in completions)
    assert charged_ns == round(stats.busy_s * 1e9)
    assert stats.load_s > 0
    assert stats.lost_s == 0


def test_a_cancelled_call_gives_its_pages_back(worker):
    async def run():
        task = asyncio.create_task(worker.generate(requests_of(3, max_tokens=400, prefix="c")))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await worker.generate(requests_of(2))

    assert len(asyncio.run(run())) == 2
    tree = worker.engine.scheduler.tree
    assert tree.num_available == worker.engine.scheduler.pool.num_pages
    assert worker.stats().lost_s > 0


def test_a_broken_engine_fails_its_calls_and_every_later_one(tiny_llama):
    worker = EngineWorker(EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1))

    def explode():
        raise RuntimeError("CUDA error: an illegal memory access")

    worker.engine.step = explode  # a fault that cannot be had on a CPU: the device breaks in mid-step
    with pytest.raises(EngineError, match="illegal memory access"):
        asyncio.run(worker.generate(requests_of(2)))
    with pytest.raises(EngineError, match="make a new worker"):
        asyncio.run(worker.generate(requests_of(1)))
    worker.close()


def test_a_closed_worker_says_so(tiny_llama):
    worker = EngineWorker(EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1))
    worker.close()
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(worker.generate(requests_of(1)))


def test_the_corpus_index_is_read_and_loaded_between_steps_by_the_engines_own_thread(tiny_llama):
    worker = EngineWorker(EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1))
    threads, in_step = [], threading.Event()
    step = worker.engine.step

    def slow_step():
        in_step.set()
        done = step()
        in_step.clear()
        return done

    def note(*data):
        threads.append((threading.current_thread().name, in_step.is_set()))
        return b"index" if not data else data == (b"index",)

    worker.engine.step, worker.engine.corpus_index, worker.engine.load_corpus_index = slow_step, note, note

    async def run():
        assert await asyncio.to_thread(worker.export_corpus_index) == b"index", "while the engine is idle"
        answer = asyncio.create_task(worker.generate(requests_of(3, max_tokens=60)))
        await asyncio.to_thread(in_step.wait, 10)
        assert await asyncio.to_thread(worker.import_corpus_index, b"index")
        assert not answer.done(), "between steps, not after the last one"
        return await answer

    assert len(asyncio.run(run())) == 3
    assert threads == [("shoal-engine", False)] * 2
    stats = worker.stats()
    assert [drafter.name for drafter in stats.drafters] == ["corpus", "ngram"]
    worker.close()
    with pytest.raises(EngineError, match="closed"):
        worker.export_corpus_index()


def test_an_index_that_cannot_be_read_fails_its_caller_and_no_row(worker, monkeypatch):
    def explode():
        raise ValueError("broken index")

    monkeypatch.setattr(worker.engine, "corpus_index", explode)
    with pytest.raises(ValueError, match="broken index"):
        worker.export_corpus_index()
    assert len(asyncio.run(worker.generate(requests_of(2)))) == 2


async def listen(worker, request, min_gap_s=0.0):
    """All events of a stream, by output, and its Completion."""
    by_output = [[] for _ in range(request.sampling.n)]
    async for event in worker.stream([request], min_gap_s):
        if isinstance(event, Completion):
            completion = event
        else:
            by_output[event.index].append(event)
    assert event is completion, "a request's Completion is its last event"
    return by_output, completion


def streaming_requests():
    for i, sampling in enumerate(
        [
            SamplingParams(max_tokens=40, ignore_eos=True),
            SamplingParams(max_tokens=40, temperature=1.0, n=3, logprobs=2),
            SamplingParams(max_tokens=60, temperature=1.0, n=2, stop=("a", "b!", "c")),
            SamplingParams(max_tokens=60, temperature=1.0, stop=("a", "e"), min_tokens=50, stop_token_ids=(70, 71)),
            SamplingParams(max_tokens=1),
        ]
    ):
        yield Request("same", [1, 5 + i, 9], sampling, seed=i)


@pytest.mark.parametrize("min_gap_s", [0.0, 1000.0])
def test_a_stream_has_the_tokens_and_the_text_of_a_call_without(worker, min_gap_s):
    requests = list(streaming_requests())

    async def run():
        streams = asyncio.gather(*(listen(worker, request, min_gap_s) for request in requests))
        return await streams, await worker.generate(requests)

    streams, whole = asyncio.run(run())
    detokenizer = Detokenizer(worker.engine.tokenizer)
    for request, (by_output, completion), expected in zip(requests, streams, whole):
        assert completion.request_id == "same" and completion.usage.completion_tokens
        for events, output, own in zip(by_output, expected.outputs, completion.outputs, strict=True):
            assert [token for event in events for token in event.token_ids] == output.token_ids == own.token_ids
            if output.logprobs is not None:
                heard = [logprob for event in events for logprob in event.logprobs]
                assert [one.token_id for one in heard] == output.token_ids
            *early, last = events
            assert min_gap_s == 0.0 or len(early) <= 1, "all but the first waited for the last"
            assert [event.finish_reason for event in early] == [None] * len(early)
            assert (last.finish_reason, last.text) == (output.finish_reason, output.text)
            streamed = StreamedText(detokenizer, request.sampling.stop)
            pieces = [streamed.add(event.token_ids) for event in early]
            assert "".join(pieces) + streamed.finish(last.text) == output.text


def test_one_stream_of_several_requests_has_a_completion_of_each(worker):
    requests = [replace(request, request_id=str(i)) for i, request in enumerate(streaming_requests())]

    async def run():
        return [event async for event in worker.stream(requests)]

    heard = {request.request_id: [] for request in requests}
    for event in asyncio.run(run()):
        heard[event.request_id].append(event)
    for events in heard.values():
        *tokens, completion = events
        assert sum(len(event.token_ids) for event in tokens) == completion.usage.completion_tokens
    lengths = [len(events) for events in heard.values()]
    assert lengths[0] > lengths[-1] == 2, "the short one is over while the others go on"


def test_tokens_come_while_the_rest_is_computed(worker):
    async def run():
        first = worker.stats().num_steps
        async with contextlib.aclosing(worker.stream(requests_of(1, max_tokens=200))) as events:
            event = await anext(events)
            return len(event.token_ids), worker.stats().num_steps - first

    num_tokens, num_steps = asyncio.run(run())
    assert num_tokens < 50 and num_steps < 150


def test_a_stream_that_is_left_gives_its_pages_back(worker):
    async def run():
        async with contextlib.aclosing(worker.stream(requests_of(1, max_tokens=200))) as events:
            await anext(events)
        await worker.generate(requests_of(1))
        await asyncio.sleep(0.2)

    asyncio.run(run())
    assert worker.load().num_running == worker.load().num_waiting == worker.load().num_pages_in_use == 0


def test_an_event_loop_that_is_gone_breaks_no_engine(worker):
    loop = asyncio.new_event_loop()
    events = worker.stream(requests_of(1, max_tokens=200))
    loop.run_until_complete(anext(events))
    loop.close()
    assert len(asyncio.run(worker.generate(requests_of(2)))) == 2
    assert worker.failure is None


def test_a_request_that_is_refused_streams_its_error(worker):
    by_output, completion = asyncio.run(listen(worker, Request("empty", [], SamplingParams())))
    assert by_output == [[]] and completion.error.kind == "empty_prompt"


def test_a_broken_engine_fails_its_streams(tiny_llama):
    worker = EngineWorker(EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1))

    def explode():
        raise RuntimeError("device lost")

    async def run():
        async for _ in worker.stream(requests_of(1, max_tokens=200)):
            worker.engine.step = explode

    with pytest.raises(EngineError, match="device lost"):
        asyncio.run(run())
    assert isinstance(worker.failure, RuntimeError)
    worker.close()
