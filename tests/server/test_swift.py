"""What keeps a token from waiting on its way to the client."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import socket
import sys
import threading
import time
import urllib.request

import pytest
from server_parts import Served, hosted

from armillary.engine.request import Answer
from armillary.server import Server
from armillary.server.answering import Post


@pytest.fixture
def running():
    one = Served(Server([hosted()]))
    yield one
    one.close()


def test_no_token_waits_for_an_acknowledgement(running) -> None:
    """On sockets that asyncio does not see to by itself: those of `Served` were made without the protocol's number."""
    assert running.listening.proto == 0
    with socket.create_connection(("127.0.0.1", running.port)):
        time.sleep(0.2)
        ours = [
            one
            for one in gc.get_objects()
            if isinstance(one, socket.socket) and one.fileno() >= 0 and one is not running.listening
        ]
        accepted = [one for one in ours if one.getsockname()[:2] == ("127.0.0.1", running.port)]
        assert accepted
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in accepted)


def test_threads_take_turns_often_while_there_is_a_server() -> None:
    others = sys.getswitchinterval()
    sys.setswitchinterval(0.004)  # other servers of this process may have shortened it
    try:
        before = sys.getswitchinterval()
        one = Served(Server([hosted()]))
        during = sys.getswitchinterval()
        one.close()
        after = sys.getswitchinterval()
    finally:
        sys.setswitchinterval(others)
    assert during < 0.001 <= before
    assert after == pytest.approx(before)


def test_a_short_text_is_prepared_on_the_spot_and_others_by_workers(running, monkeypatch) -> None:
    seen = []
    model = running.server.models["tiny"]
    plain = type(model).prompts
    monkeypatch.setattr(type(model), "prompts", lambda *given: seen.append(threading.current_thread()) or plain(*given))
    others = ({"prompt": "x" * 1000}, {"prompt": [70] * 1000}, {"regex": "[ab]{3}"}, {"prompt": ["a", "b"]})
    for more in ({}, {"prompt": [70] * 99}, *others, {"prompt": [[70, 71]]}):
        body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 4} | more).encode()
        asked = urllib.request.Request(f"{running.url}/v1/completions", body, {"content-type": "application/json"})
        assert json.load(urllib.request.urlopen(asked))["choices"]
    assert [one is running.thread for one in seen] == [True, True, *[False] * 5]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_between_the_first_and_the_last_wake_nobody(running, monkeypatch, stream) -> None:
    """Those of a stream are sent from where they come; those of a whole answer do not come to the loop at all."""
    put, said = [], []
    queue, post = asyncio.Queue.put_nowait, Post.put
    monkeypatch.setattr(asyncio.Queue, "put_nowait", lambda self, item: put.append(item) or queue(self, item))
    monkeypatch.setattr(Post, "put", lambda self, take, item: said.append(item) or post(self, take, item))
    slots = running.server.models["tiny"].engine.slots
    plain = slots.extend  # so that each comes by itself
    monkeypatch.setattr(slots, "extend", lambda *given, **more: time.sleep(0.01) or plain(*given, **more))
    monkeypatch.setattr(slots, "go_on_together", lambda *given: None)
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "min_tokens": 40, "seed": 1, "stream": stream}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as found:
        text = found.read().decode()
    assert text.count('"text"') == (40 if stream else 1)
    assert len(said) == (40 if stream else 2)
    assert len([one for one in put if isinstance(one, tuple)]) < 10


def test_the_post_loses_nothing_and_keeps_the_order() -> None:
    """From several threads at once, each piece comes once, in the order of its thread."""
    count, senders = 2000, 3

    async def take() -> tuple[list[tuple[int, int]], int]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        post, calls = Post(loop), 0
        inner = loop.call_soon_threadsafe

        def counted(*given):
            nonlocal calls
            calls += 1
            return inner(*given)

        loop.call_soon_threadsafe = counted
        for at in range(count):
            post.put(queue.put_nowait, (senders, at))
        assert calls == 0
        for _ in range(3):  # what comes while the loop does not look costs one call
            post.wake()
        assert calls == 1

        def send(sender: int) -> None:
            for at in range(count):
                post.put(queue.put_nowait, (sender, at))
                if at % 3 == 2 or at == count - 1:
                    post.wake()

        threads = [threading.Thread(target=send, args=(sender,)) for sender in range(senders)]
        for thread in threads:
            thread.start()
        found = [await queue.get() for _ in range(count * (senders + 1))]
        for thread in threads:
            thread.join()
        return found, calls

    found, _ = asyncio.run(take())
    for sender in range(senders + 1):
        assert [at for one, at in found if one == sender] == list(range(count))


def test_a_post_to_a_loop_that_has_closed_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    post, queue = Post(loop), asyncio.Queue()
    loop.close()
    for item in (1, 2):
        post.put(queue.put_nowait, item)
        post.wake()
    assert queue.empty()


def test_a_server_prepares_constraints_and_leaves_no_process() -> None:
    one = Served(Server([hosted()]))
    grammars = one.server.models["tiny"].grammars
    grammars._warming.join(30)
    trial = grammars._trial
    assert trial is not None and trial.poll() is None
    one.close()
    assert trial.poll() is not None


def test_without_the_quick_loop_and_reader_the_plain_ones_serve(monkeypatch) -> None:
    """They are extras of the extra: what is installed decides, and both ways are tested (`test_connection`)."""
    serving = sys.modules["armillary.server.run"]
    made = serving._quickest_loop()
    assert made is None or made.__module__.startswith("uvloop")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert serving._quickest_loop() is None
    monkeypatch.setitem(sys.modules, "httptools", None)
    monkeypatch.delitem(sys.modules, "uvicorn.protocols.http.httptools_impl", raising=False)
    spec = importlib.util.find_spec("armillary.server.connection")
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.quickest is again.H11


def test_what_is_over_needs_no_collector(running) -> None:
    """Answers in circles wait, with all their tokens, for Python to look through everything it holds, which stops all
    else for a tenth of a second. The engine may hold what its last step computed."""
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "n": 2, "logprobs": 2}
    ways = [{"stream": False}, {"stream": True}, {"stream": True, "regex": "[ab]{3}"}, {"n": 1}]
    gc.collect()
    gc.disable()
    try:
        for way in 3 * ways:
            body = json.dumps(asked | way).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{running.url}/v1/completions", body, headers)
            with urllib.request.urlopen(request) as found:
                assert found.read()
        running.quiet()
        end = time.monotonic() + 5
        while (held := alive()) > 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert held <= 2
    finally:
        gc.enable()


def alive() -> int:
    return sum(isinstance(one, Answer) for one in gc.get_objects())
