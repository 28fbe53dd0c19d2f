"""Grammars: compiled once for all requests, tried under limits first, dropped without waiters, bounded in the cache."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest
import server_lab as lab
from patience import PATIENCE_S, eventually

from narrows.api import QueueFull
from narrows.errors import ConfigError, NarrowsError
from narrows.server.app import state_of
from narrows.server.structured_output import trial as process_module
from narrows.server.structured_output.cache import GrammarPool, Grammars
from narrows.server.structured_output.constraints import Form, GuideMaker, choice_form, json_form, regex_form
from narrows.server.structured_output.guide import Grammar, Memory
from narrows.server.structured_output.trial import Ended, GrammarLimits, in_words
from narrows.text import Tokenizer

HOSTILE = {"type": "integer", "multipleOf": 999983}
"""Takes most of a minute to compile."""
LARGE = "(a{1000}){1000}"
"""Takes seconds and hundreds of megabytes for its first mask, without limits."""
FORM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


class FakeTrial:
    """Passes every grammar when ``gate`` is open; keeps the requested and the ended ones."""

    def __init__(self, nbytes: int = 1000) -> None:
        self.nbytes = nbytes
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.wrong: dict[str, Exception] = {}
        self._end = threading.Event()

    def try_out(self, text: str, wanted: Callable[[], bool]) -> int:
        if not wanted():
            raise Ended("gone")
        self._end.clear()
        self.begun.append(text)
        while not self.gate.wait(0.005):
            if self._end.is_set():
                self.ended.append(text)
                raise Ended("gone")
        if text in self.wrong:
            raise self.wrong[text]
        return self.nbytes

    def end(self) -> None:
        self._end.set()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def grammar(word: str) -> str:
    return f'start: "{word}"'


@pytest.fixture
def maker(plain_tokenizer: Tokenizer) -> Iterator[Callable[..., GuideMaker]]:
    made: list[GuideMaker] = []

    def make(**limits: Any) -> GuideMaker:
        made.append(GuideMaker(plain_tokenizer, vocab_size=lab.VOCAB, end_ids={1}, limits=GrammarLimits(**limits)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def grammars(maker: Callable[..., GuideMaker]) -> Iterator[Callable[..., Grammars]]:
    made: list[Grammars] = []

    def make(*trials: FakeTrial, clock: Callable[[], float] = monotonic, **limits: Any) -> Grammars:
        tokens = maker().tokens
        made.append(Grammars(lambda: tokens, trials, GrammarLimits(**limits), clock=clock))
        return made[-1]

    yield make
    for each in made:
        each.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


# -- once ------------------------------------------------------------------------------------------------------------


async def _texts_and_requests(plain: lab.Lab) -> None:
    for _ in range(3):
        answer = await plain.complete(["hi", "ho"], guided_json=FORM, n=3, max_tokens=40)
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 6, answer.text
    await asyncio.gather(*(plain.chat(guided_json=FORM, max_tokens=40) for _ in range(4)))


def test_a_schema_is_compiled_once_for_all_texts_of_all_requests(plain: lab.Lab) -> None:
    asyncio.run(_texts_and_requests(plain))
    guides = state_of(plain.app).guides
    assert guides is not None and guides.grammars.num_compiled == 1 and len(plain.backend.submitted) == 3 * 6 + 4
    assert len({id(each.guide) for each in plain.backend.submitted}) == 3 * 6 + 4, "texts share a grammar, not a guide"
    asyncio.run(plain.complete("hi", guided_json={**FORM, "required": []}, max_tokens=4))
    assert guides.grammars.num_compiled == 2


def test_requests_share_one_compilation(grammars: Callable[..., Grammars]) -> None:
    first, second = FakeTrial(), FakeTrial()
    for trial in (first, second):
        trial.gate.clear()
    found = grammars(first, second)

    async def ask() -> list[Grammar]:
        asked = [asyncio.ensure_future(found.get(grammar("a"))) for _ in range(5)]
        await until(lambda: bool(first.begun))
        first.gate.set()
        return await asyncio.gather(*asked)

    got = asyncio.run(ask())
    assert all(each is got[0] for each in got)
    assert first.begun + second.begun == [grammar("a")] and found.num_compiled == 1


def test_two_grammars_are_tried_at_once_where_there_are_two_places(grammars: Callable[..., Grammars]) -> None:
    first, second = FakeTrial(), FakeTrial()
    first.gate.clear()
    found = grammars(first, second)

    async def ask() -> None:
        slow = asyncio.ensure_future(found.get(grammar("a")))
        await until(lambda: bool(first.begun))
        assert (await found.get(grammar("b"))).text == grammar("b")
        assert not slow.done()
        first.gate.set()
        await slow

    asyncio.run(ask())


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_cache_drops_the_least_recently_used(grammars: Callable[..., Grammars]) -> None:
    trial = FakeTrial()
    found = grammars(trial, num_kept=2)

    async def ask(words: str) -> None:
        for word in words:
            await found.get(grammar(word))

    asyncio.run(ask("aba"))
    assert trial.begun == [grammar("a"), grammar("b")]
    asyncio.run(ask("caca"))  # b goes
    assert [text[-2] for text in trial.begun] == ["a", "b", "c"] and len(found) == 2
    asyncio.run(ask("b"))
    assert [text[-2] for text in trial.begun] == ["a", "b", "c", "b"] and len(found) == 2


def test_cached_grammars_are_evicted_unless_in_use(grammars: Callable[..., Grammars]) -> None:
    size = 1000 + len(grammar("a"))
    found = grammars(FakeTrial(1000), total_bytes=2 * size)

    async def ask() -> None:
        for word in "abcd":
            await found.get(grammar(word))
        assert len(found) == 2 and found.memory.used == 2 * size
        used = [await found.get(grammar(word)) for word in "cd"]
        with pytest.raises(QueueFull, match="constraints in use take"):
            await found.get(grammar("e"))
        used.clear()
        assert (await found.get(grammar("f"))).text == grammar("f") and found.memory.used <= 2 * size

    asyncio.run(ask())


def test_a_grammar_in_use_counts_in_full_until_it_is_dropped(grammars: Callable[..., Grammars]) -> None:
    size = 1000 + len(grammar("a"))
    found = grammars(FakeTrial(1000), kept_bytes=2 * size)

    async def ask() -> None:
        used = [await found.get(grammar(word)) for word in "abc"]
        assert len(found) == 2 and found.memory.used == 3 * size
        used.clear()
        gc.collect()
        assert found.memory.used == 2 * size, "the third is forgotten by the threads that compiled it too"

    asyncio.run(ask())


class Panic(BaseException):
    """As llguidance's own, which is no Exception."""


@pytest.mark.parametrize("place", ["trial", "compiling"])
def test_a_thread_that_compiles_outlives_a_panic(place: str) -> None:
    def fail(text: str) -> None:
        if text == "a":
            raise Panic

    class Failing(FakeTrial):
        def try_out(self, text: str, wanted: Callable[[], bool]) -> int:
            if place == "trial":
                fail(text)
            return 1

    def compile_(text: str, nbytes: int) -> str:
        fail(text)
        return text

    pool: GrammarPool[str] = GrammarPool([Failing()], compile_)
    with pytest.raises(NarrowsError, match="could not be compiled"):
        pool.submit("a").result(PATIENCE_S)
    assert pool.submit("b").result(PATIENCE_S) == "b"
    pool.close()


def test_too_many_that_wait_are_refused(grammars: Callable[..., Grammars]) -> None:
    trial = FakeTrial()
    trial.gate.clear()
    found = grammars(trial, num_waiting=2)

    async def ask() -> None:
        asked = [asyncio.ensure_future(found.get(grammar("a")))]
        await until(lambda: bool(trial.begun))
        asked += [asyncio.ensure_future(found.get(grammar(word))) for word in "bcbc"]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 constraints are waiting"):
            await found.get(grammar("d"))
        trial.gate.set()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert found.num_compiled == 3


def test_failures_are_cached_for_a_while(grammars: Callable[..., Grammars]) -> None:
    trial, clock = FakeTrial(), Clock()
    trial.wrong = {grammar(word): ConfigError(f"too much of {word}") for word in "abc"}
    found = grammars(trial, clock=clock, failed_s=60.0, num_failed=2)

    async def ask(word: str, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(ConfigError, match=f"too much of {word}"):
                await found.get(grammar(word))

    asyncio.run(ask("a", 100))
    assert len(trial.begun) == 1
    clock.now += 61
    asyncio.run(ask("a"))
    assert len(trial.begun) == 2
    for word in "bc":  # a is the oldest of three
        asyncio.run(ask(word, 2))
    asyncio.run(ask("a"))
    assert [text[-2] for text in trial.begun] == ["a", "a", "b", "c", "a"] and found.num_compiled == 0


def test_server_fault_is_raised_and_not_cached(grammars: Callable[..., Grammars]) -> None:
    trial = FakeTrial()
    trial.wrong = {grammar("a"): RuntimeError("no process could be started")}
    found = grammars(trial)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            asyncio.run(found.get(grammar("a")))
    trial.wrong.clear()
    assert asyncio.run(found.get(grammar("a"))).text == grammar("a")


# -- no waiting client -----------------------------------------------------------------------------------------------


def test_trial_ends_with_its_last_waiter(grammars: Callable[..., Grammars]) -> None:
    trial = FakeTrial()
    trial.gate.clear()
    found = grammars(trial)

    async def ask() -> None:
        one, two = (asyncio.ensure_future(found.get(grammar("a"))) for _ in range(2))
        await until(lambda: bool(trial.begun))
        behind = asyncio.ensure_future(found.get(grammar("b")))
        gone = asyncio.ensure_future(found.get(grammar("c")))
        await asyncio.sleep(0)
        one.cancel()
        gone.cancel()
        await asyncio.gather(one, gone, return_exceptions=True)
        assert not trial.ended, "another one still waits for it"
        two.cancel()
        await until(lambda: trial.ended == [grammar("a")])
        trial.gate.set()
        assert (await behind).text == grammar("b")
        assert (await found.get(grammar("a"))).text == grammar("a")

    asyncio.run(ask())
    assert [text[-2] for text in trial.begun] == ["a", "b", "a"], "c was never begun"


def test_a_disconnect_frees_the_place_of_its_grammar(served: Any) -> None:
    guides = state_of(served.lab.app).guides
    trial = FakeTrial()
    trial.gate.clear()
    guides.grammars = Grammars(lambda: guides.tokens, [trial], GrammarLimits())
    port = int(served.url.rsplit(":", 1)[1])
    body = b'{"messages":[{"role":"user","content":"x"}],"guided_json":{"type":"integer"}}'
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head % len(body) + body)
        eventually(lambda: bool(trial.begun))
    eventually(lambda: len(trial.ended) == 1)
    guides.grammars.close()


def test_a_process_in_the_midst_of_a_grammar_is_ended(maker: Callable[..., GuideMaker]) -> None:
    trial = maker(cpu_s=3600.0).trials[0]
    text = f"start: json_text\n{json_form(HOSTILE).rules}"
    said: list[type[BaseException]] = []

    def work() -> None:
        try:
            trial.try_out(text, lambda: True)
        except Ended as error:
            said.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: trial.num_started == 1)
    while thread.is_alive():  # it may be on its way still
        trial.end()
        thread.join(0.02)
    assert said == [Ended]
    assert trial.try_out('start: "a"', lambda: True) >= 0 and trial.num_started == 2
    with pytest.raises(Ended):
        trial.try_out('start: "a"', lambda: False)


def test_a_process_that_has_grown_is_replaced(
    maker: Callable[..., GuideMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = maker().trials[0]
    assert trial.try_out('start: "a"', lambda: True) >= 0
    assert trial.try_out('start: "b"', lambda: True) >= 0 and trial.num_started == 1, "it has not grown"
    monkeypatch.setattr(process_module, "_GROWN_BYTES", -(1 << 40))
    assert trial.try_out('start: "c"', lambda: True) >= 0 and trial.num_started == 1
    assert trial.try_out('start: "d"', lambda: True) >= 0 and trial.num_started == 2


# -- limits ----------------------------------------------------------------------------------------------------------


def test_slow_grammar_is_refused_and_the_next_one_works(make_lab: Callable[..., lab.Lab]) -> None:
    of = make_lab()
    state = state_of(of.app)
    assert state.guides is not None and of.tokenizer is not None
    limits = GrammarLimits(cpu_s=0.3)
    state.guides = GuideMaker(of.tokenizer, vocab_size=lab.VOCAB, end_ids={1}, limits=limits, num_trials=1)
    trial = state.guides.trials[0]
    for _ in range(5):
        answer = asyncio.run(of.chat(guided_json=HOSTILE))
        error = lab.error_of(answer)
        assert answer.status_code == 400 and error["param"] == "guided_json"
        assert "more than 0.3 s of processor time" in error["message"]
    assert trial.num_started == 1 and not of.backend.submitted, "sent five times, it cost one trial"
    assert asyncio.run(of.chat(guided_json=FORM, max_tokens=3)).status_code == 200
    assert trial.num_started == 2 and state.guides.grammars.num_compiled == 1


def test_a_grammar_that_takes_too_much_memory_is_refused(maker: Callable[..., GuideMaker]) -> None:
    guides = maker(memory_bytes=16 << 20)
    with pytest.raises(ConfigError, match="more than 16 MB of memory"):
        asyncio.run(guides.guides([regex_form(LARGE)], 1))
    assert len(asyncio.run(guides.guides([json_form(FORM)], 2))) == 2


def test_a_grammar_that_is_too_long_is_not_even_tried(maker: Callable[..., GuideMaker]) -> None:
    guides = maker()
    with pytest.raises(ConfigError, match=r"8000\d\d\d characters long as a grammar; at most 1000000"):
        asyncio.run(guides.guides([choice_form(["x" * 8_000_000])], 1))
    assert guides.trials[0].num_started == 0


def test_an_automaton_that_is_too_large_names_the_limits(maker: Callable[..., GuideMaker]) -> None:
    enum = json_form({"enum": [f"value {7919 * number % 104729}" for number in range(20_000)]})
    with pytest.raises(ConfigError, match="the limits are 40000 steps to build the automaton, 20000 states"):
        asyncio.run(maker(lexer_fuel=40_000).guides([enum], 1))


def test_impossible_and_non_unicode_grammars_are_explained(maker: Callable[..., GuideMaker]) -> None:
    guides = maker()
    cycle = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    for form, said in (
        (json_form(cycle), "allows no first token"),
        (Form("x", 'x: "\ud800"'), r"half of a surrogate pair \(U\+D800\)"),
        (
            json_form({"properties": {"foo": "bar"}}),
            "failed to compile JSON schema: schema must be an object or boolean",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            asyncio.run(guides.guides([form], 1))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("(?=a)b", "look-around"), (r"(a)\1", "backreferences are not supported"), ("a{5,2}", "invalid repetition count")],
)
def test_regex_errors_are_not_truncated(plain: lab.Lab, pattern: str, reason: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    for fields, param in (({"guided_regex": pattern}, "guided_regex"), ({"guided_json": schema}, "guided_json")):
        error = lab.error_of(asyncio.run(plain.chat(**fields)))
        assert error["param"] == param and reason in error["message"] and "regex parse error" in error["message"]


def test_the_tokenizer_is_written_out_once_for_all_trial_processes(
    plain_tokenizer: Tokenizer, maker: Callable[..., GuideMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    to_json = plain_tokenizer.to_json
    monkeypatch.setattr(plain_tokenizer, "to_json", lambda: calls.append("written") or to_json())
    guides = maker()
    (first, second) = guides.trials
    assert first.try_out(grammar("one"), lambda: True) >= 0
    first.end()
    assert first.try_out(grammar("two"), lambda: True) >= 0 and second.try_out(grammar("one"), lambda: True) >= 0
    assert (first.num_started, second.num_started, len(calls)) == (2, 1, 1)


def test_library_errors_become_one_line() -> None:
    limits = GrammarLimits()
    assert in_words("", limits) == "not valid"
    assert in_words("bad <non-verbose/>\n", limits) == "bad"
    assert in_words("at 3(12): bad\n   1 | start: x\n", limits) == "bad"
    assert in_words("lexer error: too many states: 9 >= 9 <non-verbose/>", limits).endswith(
        "make the constraint simpler"
    )


def test_memory_counts_grammars_as_long_as_they_live(maker: Callable[..., GuideMaker]) -> None:
    memory = Memory()
    one = Grammar(grammar("a"), 500, maker().tokens, GrammarLimits(), memory)
    assert one.renew() is one
    one.is_broken = True
    two = one.renew()
    assert memory.used == 1000 and one.renew() is two and two.renew() is two
    del one, two
    assert memory.used == 0
