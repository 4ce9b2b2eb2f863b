"""Event loops: the same answers and errors as in threads, prompt cancellation, and slow readers."""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

import pytest

import candle_llama
from candle_llama import SamplingParams
from candle_llama.async_stream import AsyncStream

PROMPTS = ["hello", "the world and", "a", "wording", "in the", "and"]
OPTIONS = {"max_new_tokens": 24, "temperature": 1.0, "seed": 7, "ignore_eos": True, "logprobs": 1}
LONG = {"max_new_tokens": 900, "ignore_eos": True}


def same(one: candle_llama.Completion, other: candle_llama.Completion) -> bool:
    return (one.text, one.token_ids, one.logprobs) == (other.text, other.token_ids, other.logprobs)


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_results_equal_those_of_the_calls_that_wait(llm):
    async def main():
        return await asyncio.gather(*(llm.agenerate(prompt, **OPTIONS) for prompt in PROMPTS))

    for out, prompt in zip(asyncio.run(main()), PROMPTS, strict=True):
        assert same(out, llm.generate(prompt, **OPTIONS))


def test_chats_and_streams_equal_those_that_wait(llm):
    messages = [{"role": "user", "content": "hello"}]

    async def main():
        chunks = [chunk async for chunk in llm.astream("hello", **OPTIONS)]
        text = "".join([chunk.text async for chunk in llm.astream_chat(messages, max_new_tokens=12)])
        return chunks, text, await llm.achat(messages, max_new_tokens=12)

    chunks, text, answer = asyncio.run(main())
    whole = llm.generate("hello", **OPTIONS)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [entry for chunk in chunks for entry in chunk.logprobs] == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].stats.completion_tokens == 24
    assert text == answer.text == llm.chat(messages, max_new_tokens=12).text


def test_lists_have_parameters_and_errors_of_their_own(llm):
    params = [SamplingParams(max_new_tokens=count) for count in (3, 5, 7)]

    async def main():
        outs = await llm.agenerate(["a", "b", "c"], params, ignore_eos=True)
        assert [len(out.token_ids) for out in outs] == [3, 5, 7]
        mixed = await llm.agenerate(["a", [10**6], "c"], max_new_tokens=2, return_exceptions=True)
        assert isinstance(mixed[1], ValueError)
        assert same(mixed[0], llm.generate("a", max_new_tokens=2))
        with pytest.raises(ValueError, match="vocab_size"):
            await llm.agenerate(["a", [10**6]], max_new_tokens=2)

    asyncio.run(main())


def test_errors_are_those_of_the_calls_that_wait(llm):
    async def main():
        with pytest.raises(candle_llama.ContextLengthError):
            await llm.agenerate([5] * 100_000)
        with pytest.raises(TypeError, match="did you mean"):
            await llm.agenerate("a", max_new_token=3)
        with pytest.raises(TypeError, match="for a list of prompts"):
            await llm.agenerate("a", return_exceptions=True)
        with pytest.raises(ValueError, match="messages is empty"):
            await llm.achat([])

    asyncio.run(main())
    # A stream's arguments are checked when it is made.
    with pytest.raises(TypeError, match="astream takes one prompt"):
        llm.astream(["a", "b"])
    with pytest.raises(TypeError, match="did you mean"):
        llm.astream("a", max_new_token=3)


def test_cancelling_a_task_stops_its_work_and_leaves_others_alone(demo_llm):
    expected = demo_llm.generate("Once upon a time", max_new_tokens=60, ignore_eos=True)

    async def main():
        other = asyncio.create_task(
            demo_llm.agenerate("Once upon a time", max_new_tokens=60, ignore_eos=True)
        )
        long = asyncio.create_task(demo_llm.agenerate([5] * 4000, max_new_tokens=2))
        await asyncio.sleep(0.05)
        long.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert time.monotonic() - began < 1
        return await other

    assert same(asyncio.run(main()), expected)
    until(lambda: demo_llm.metrics().running == 0)
    assert demo_llm.metrics().blocks_used == 0


def test_a_timeout_of_asyncio_stops_the_work(demo_llm):
    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(demo_llm.agenerate("Once", max_new_tokens=8000, ignore_eos=True), 0.1)

    asyncio.run(main())
    until(lambda: demo_llm.metrics().running == 0)


@pytest.mark.parametrize("way", ["aclose", "with", "break", "cancel"])
def test_a_stream_that_is_left_stops(llm, way):
    async def read(stream):
        async for _ in stream:
            pass

    async def main():
        stream = llm.astream("hello", **LONG)
        assert (await anext(stream)).finish_reason is None
        if way == "aclose":
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif way == "with":
            async with stream:
                await anext(stream)
            assert [chunk async for chunk in stream] == []
        elif way == "break":
            async for _ in stream:
                break
            del stream
        else:
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return len((await llm.agenerate("hello", max_new_tokens=3, ignore_eos=True)).token_ids)

    assert asyncio.run(main()) == 3
    until(lambda: llm.metrics().running + llm.metrics().waiting == 0)


def test_a_slow_reader_gets_larger_chunks_and_an_unread_stream_pauses(tiny: Path):
    async def main(llm):
        stream = llm.astream("hello", **LONG)
        first = await anext(stream)
        # The first chunk itself may have come after a pause.
        until(lambda: llm.metrics().tokens_out - len(first.token_ids) >= 60)
        until(lambda: llm.metrics().waiting == 1)
        made = llm.metrics().tokens_out
        assert made - len(first.token_ids) <= 70
        await asyncio.sleep(0.1)
        assert llm.metrics().tokens_out == made, "nobody reads"
        largest, tokens = 0, len(first.token_ids)
        async for chunk in stream:
            largest, tokens = max(largest, len(chunk.token_ids)), tokens + len(chunk.token_ids)
        assert largest > 10
        return tokens

    with candle_llama.load(tiny, device="cpu") as llm:
        assert asyncio.run(main(llm)) == 900


def test_a_gap_between_chunks_does_not_delay_the_end(llm):
    async def main():
        stream = llm.astream("hello", max_new_tokens=40, ignore_eos=True)
        return [chunk async for chunk in AsyncStream(stream._core, lambda: 60.0)]

    begun = time.monotonic()
    chunks = asyncio.run(main())
    assert time.monotonic() - begun < 10
    assert 1 <= len(chunks) <= 2
    assert sum(len(chunk.token_ids) for chunk in chunks) == 40


def test_closing_a_stream_ends_a_task_that_waits_for_it(demo_llm):
    async def main():
        stream = demo_llm.astream([5] * 8000, max_new_tokens=1)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.1)
        stream._core.close()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(reader, 2)

    asyncio.run(main())


def test_leaving_a_stream_that_another_task_reads_ends_the_task(demo_llm):
    async def read(stream):
        return [chunk async for chunk in stream]

    async def main():
        async with demo_llm.astream([5] * 8000, max_new_tokens=1) as stream:
            reader = asyncio.create_task(read(stream))
            await asyncio.sleep(0.1)
        return await asyncio.wait_for(reader, 2)

    assert asyncio.run(main()) == []


def test_warnings_about_a_prompt_are_given_where_it_was_used(tiny: Path):
    prompts = {"short": [7] * 10, "long": [7] * 100}
    options = {"max_new_tokens": 1, "on_overflow": "truncate_left"}
    with candle_llama.load(tiny, context_length=64) as llm:

        async def ask(name):
            with pytest.warns(UserWarning, match="tokens were cut"):
                return await llm.agenerate(prompts["long"], **options)

        asyncio.run(ask("long"))
        # Those of another thread stay there.
        started, told = threading.Barrier(2), []

        def use(name):
            started.wait()
            for _ in range(50):
                llm._core.generate(prompts[name], options, False)
                told.append((name, len(llm._core.take_warnings())))

        threads = [threading.Thread(target=use, args=(name,)) for name in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(told) == {("short", 0), ("long", 1)}


def test_closing_the_model_ends_the_tasks_that_wait(tiny: Path):
    async def main():
        llm = candle_llama.load(tiny, device="cpu")
        task = asyncio.create_task(llm.agenerate("hello", **LONG))
        await asyncio.sleep(0)
        llm.close()
        with pytest.raises(ValueError, match="closed"):
            await task

    asyncio.run(main())


def test_an_error_behind_unread_chunks_reaches_the_reader(demo: Path):
    async def main():
        with candle_llama.load(demo) as llm:
            stream = llm.astream("hello", **LONG)
            read = len((await anext(stream)).token_ids)
            # The event loop stands still, so that there are chunks and an error when it goes on.
            until(lambda: llm.metrics().tokens_out > read + 1)
            llm.close()
            second = await asyncio.wait_for(anext(stream), 5)
            assert second.token_ids
            with pytest.raises(ValueError, match="closed"):
                await asyncio.wait_for(anext(stream), 5)

    asyncio.run(main())


def test_event_loops_of_several_threads(llm):
    expected = [llm.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]
    found = []

    async def main():
        outs = await asyncio.gather(*(llm.agenerate(prompt, **OPTIONS) for prompt in PROMPTS))
        return [out.token_ids for out in outs]

    threads = [threading.Thread(target=lambda: found.append(asyncio.run(main()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


class Blind(asyncio.SelectorEventLoop):
    """An event loop that cannot watch files, as on Windows."""

    def add_reader(self, *_: object) -> None:
        if getattr(self, "is_ready", False):
            raise NotImplementedError
        super().add_reader(*_)


def test_an_event_loop_that_cannot_watch_a_pipe(llm):
    async def main():
        asyncio.get_running_loop().is_ready = True
        outs = await asyncio.gather(*(llm.agenerate(prompt, **OPTIONS) for prompt in PROMPTS))
        chunks = [chunk async for chunk in llm.astream("hello", **OPTIONS)]
        return outs, chunks

    with asyncio.Runner(loop_factory=Blind) as runner:
        outs, chunks = runner.run(main())
    assert [out.token_ids for out in outs] == [
        llm.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS
    ]
    assert "".join(chunk.text for chunk in chunks) == llm.generate("hello", **OPTIONS).text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_event_loops_leave_no_files_and_threads_behind(llm):
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    async def main():
        await llm.agenerate("hello", max_new_tokens=2)
        [chunk async for chunk in llm.astream("hello", max_new_tokens=2)]

    asyncio.run(main())
    before = count()
    for _ in range(30):
        asyncio.run(main())
    assert count() == before


def test_a_stream_cannot_be_pickled(llm):
    import pickle

    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(llm.astream("hello", max_new_tokens=2))
