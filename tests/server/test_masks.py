"""Guides brought forward: at once where masks are quick, on threads where not, in turn, with a new lexer if need be."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import server_lab as lab
from patience import PATIENCE_S

from narrows.server.structured_output import guide as compiled
from narrows.server.structured_output.constraints import GuideMaker, json_form, regex_form
from narrows.server.structured_output.guide import Grammar, GrammarGuide, MaskThreads, Memory
from narrows.server.structured_output.trial import GrammarLimits
from narrows.text import Tokenizer

ITEMS = json_form({"type": "array", "items": {"type": "integer"}, "minItems": 1000})


class Kept:
    """A lane that runs its work only when the test does."""

    def __init__(self) -> None:
        self.guides: list[GrammarGuide] = []

    def submit(self, guide: GrammarGuide) -> None:
        self.guides.append(guide)

    def go_on(self) -> None:
        self.guides.pop(0).make()


@pytest.fixture
def tokens(plain_tokenizer: Tokenizer) -> Iterator[GuideMaker]:
    made = GuideMaker(plain_tokenizer, vocab_size=lab.VOCAB, end_ids={1})
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[MaskThreads]:
    made = MaskThreads()
    yield made
    made.close()


@pytest.fixture
def make(tokens: GuideMaker) -> Callable[..., Grammar]:
    def made(text: str = 'start: /[ab]{1,500}/ "c"', **limits: object) -> Grammar:
        return Grammar(text, 0, tokens.tokens, GrammarLimits(**limits), Memory())  # type: ignore[arg-type]

    return made


def ids_of(mask: bytes) -> list[int]:
    return [token for token in range(2, lab.VOCAB) if mask[token // 8] >> (token % 8) & 1]


def token_of(tokenizer: Tokenizer | GuideMaker, text: str) -> int:
    found = tokenizer.tokens.tokenize_str(text) if isinstance(tokenizer, GuideMaker) else tokenizer.encode(text)
    assert len(found) == 1
    return found[0]


def prove(grammar: Grammar) -> None:
    while not grammar.is_proven:
        grammar.took(0.0, 0.0)


# -- a guide ---------------------------------------------------------------------------------------------------------


def test_finished_mask_wakes_its_waiter(make: Callable[..., Grammar], tokens: GuideMaker) -> None:
    lane, told = Kept(), []
    guide = GrammarGuide(make(), lane)
    a, c = token_of(tokens, "a"), token_of(tokens, "c")
    assert guide.ready and a in ids_of(guide.allowed()) and c not in ids_of(guide.allowed())
    guide.advance(a)
    guide.when_ready(lambda: told.append("first"))
    assert not guide.ready and not guide.wait(0.0) and not told
    lane.go_on()
    assert guide.ready and guide.wait(0.0) and told == ["first"]
    assert {a, c} <= set(ids_of(guide.allowed()))
    guide.when_ready(lambda: told.append("at once"))
    assert told == ["first", "at once"]
    guide.advance(c)
    lane.go_on()
    assert not any(guide.allowed()) and not guide.problem, "fulfilled: nothing may follow"


def test_a_guide_that_has_ended_makes_no_mask(make: Callable[..., Grammar], tokens: GuideMaker) -> None:
    lane = Kept()
    guide = GrammarGuide(make(), lane)
    guide.advance(token_of(tokens, "a"))
    guide.end()
    lane.go_on()
    assert not guide.ready


def test_waiter_is_woken_and_slow_grammar_is_not_waited_for(make: Callable[..., Grammar], tokens: GuideMaker) -> None:
    lane = Kept()
    grammar = make()
    guide = GrammarGuide(grammar, lane)
    guide.advance(token_of(tokens, "a"))
    thread = threading.Timer(0.02, lane.go_on)
    thread.start()
    assert guide.wait(60.0)
    thread.join()
    guide.advance(token_of(tokens, "a"))
    grammar.took(1.0, 1.0)
    assert not guide.wait(60.0), "or this test takes a minute"


def test_slow_mask_ends_its_text_and_names_the_limit(
    make: Callable[..., Grammar], tokens: GuideMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Kept()
    guide = GrammarGuide(make(mask_s=0.25), lane)
    clock = iter([0.0, 0.2, 1.0, 1.3])
    monkeypatch.setattr(compiled, "thread_time", lambda: next(clock))
    guide.advance(token_of(tokens, "a"))
    lane.go_on()
    assert any(guide.allowed()) and not guide.problem
    guide.advance(token_of(tokens, "a"))
    lane.go_on()
    assert not any(guide.allowed()) and "took 0.3 s of processor time; the limit is 0.25 s" in guide.problem


# -- quick and slow --------------------------------------------------------------------------------------------------


def test_quick_masks_prove_a_grammar_until_a_slow_one(make: Callable[..., Grammar]) -> None:
    grammar = make()
    prove(grammar)
    assert not grammar.is_slow
    grammar.took(1.0, None)  # by the clock alone: the machine may have been busy
    assert not grammar.is_proven and not grammar.is_slow
    prove(grammar)
    for needed in (16, 32, 64):
        grammar.took(1.0, 1.0)
        counted = 0
        while not grammar.is_proven:
            assert grammar.is_slow
            grammar.took(0.0, 0.0)
            counted += 1
        assert counted == needed and not grammar.is_slow
    grammar.took(1.0, 0.0)
    assert grammar.is_proven, "waiting for a processor is not slow"


def made_on(guide: GrammarGuide, token: int) -> str:
    """The name of the thread that makes the guide's next mask."""
    real, names, done = guide.make, [], threading.Event()

    def make() -> None:
        names.append(threading.current_thread().name)
        real()

    guide.make = make  # type: ignore[method-assign]
    guide.advance(token)
    guide.when_ready(done.set)
    assert done.wait(PATIENCE_S)
    guide.make = real  # type: ignore[method-assign]
    return names[0]


def test_proven_grammars_make_masks_inline_others_on_threads(
    make: Callable[..., Grammar], threads: MaskThreads, tokens: GuideMaker
) -> None:
    grammar, a = make(), token_of(tokens, "a")
    guide = GrammarGuide(grammar, threads)
    here = threading.current_thread().name
    assert made_on(guide, a) == "narrows masks quick 0"
    prove(grammar)
    assert made_on(guide, a) == here
    grammar.took(1.0, 1.0)
    assert made_on(guide, a).startswith("narrows masks slow")
    prove(grammar)
    assert made_on(guide, a) == here


def test_proven_grammar_in_use_elsewhere_is_not_waited_for(
    make: Callable[..., Grammar], threads: MaskThreads, tokens: GuideMaker
) -> None:
    grammar, a = make(), token_of(tokens, "a")
    first, second = GrammarGuide(grammar, threads), GrammarGuide(grammar, threads)
    begun, go_on, real = threading.Event(), threading.Event(), first.make

    def held() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        real()

    first.make = held  # type: ignore[method-assign]
    first.advance(a)
    assert begun.wait(PATIENCE_S)
    prove(grammar)
    second.advance(a)  # a lock that its matcher shares may be taken
    assert not second.ready
    go_on.set()
    assert first.wait(PATIENCE_S) and second.wait(PATIENCE_S)


def test_grammars_take_turns_and_each_goes_on_in_order(
    make: Callable[..., Grammar], threads: MaskThreads, tokens: GuideMaker
) -> None:
    many, other = make(), make()
    a = token_of(tokens, "a")
    order: list[str] = []
    gate, done = threading.Event(), threading.Event()

    def noted(guide: GrammarGuide, name: str, hold: bool = False) -> GrammarGuide:
        real = guide.make

        def make() -> None:
            if hold:
                assert gate.wait(PATIENCE_S)
            order.append(name)
            real()
            if len(order) == 5:
                done.set()

        guide.make = make  # type: ignore[method-assign]
        return guide

    first = noted(GrammarGuide(many, threads), "many 0", hold=True)
    first.advance(a)  # keeps the one thread
    for number in range(1, 4):
        noted(GrammarGuide(many, threads), f"many {number}").advance(a)
    noted(GrammarGuide(other, threads), "other").advance(a)
    gate.set()
    assert done.wait(PATIENCE_S)
    assert order == ["many 0", "other", "many 1", "many 2", "many 3"]


def test_a_mask_that_cannot_be_made_ends_its_text_alone(
    make: Callable[..., Grammar], threads: MaskThreads, tokens: GuideMaker
) -> None:
    grammar, a = make(), token_of(tokens, "a")
    broken, sound = GrammarGuide(grammar, threads), GrammarGuide(grammar, threads)

    def fails() -> None:
        raise RuntimeError("broken")

    broken.make = fails  # type: ignore[method-assign]
    broken.advance(a)
    sound.advance(a)
    assert broken.wait(PATIENCE_S) and sound.wait(PATIENCE_S)
    assert "RuntimeError" in broken.problem and not any(broken.allowed())
    assert not sound.problem and any(sound.allowed()) and grammar.is_broken


# -- a lexer that has become too large -------------------------------------------------------------------------------


def walk(guide: GrammarGuide, lane: Kept, seed: int, steps: int) -> int:
    """Random steps; how many went well."""
    source = random.Random(seed)
    for number in range(steps):
        if not (ids := ids_of(guide.allowed())):
            return number
        guide.advance(source.choice(ids))
        while lane.guides:
            lane.go_on()
    return steps


WIDE = f"start: pattern\n{regex_form('[a-d]*a[a-d]{18}e').rules}"
"""Its automaton has thousands of states, and a text sees some of them."""


def test_a_lexer_worn_out_by_other_texts_is_replaced(make: Callable[..., Grammar]) -> None:
    lane = Kept()

    def alone(seed: int, states: int) -> GrammarGuide:
        guide = GrammarGuide(make(WIDE, lexer_states=states), lane)
        walk(guide, lane, seed, 40)
        return guide

    def suffices(states: int) -> bool:
        return not any(alone(seed, states).problem for seed in range(12))

    states = next(states for states in range(100, 20_000, 100) if suffices(states))
    shared = make(WIDE, lexer_states=states)
    guides = [GrammarGuide(shared, lane) for _ in range(12)]
    for seed, guide in enumerate(guides):
        walk(guide, lane, seed, 40)
        assert not guide.problem, f"text {seed}"
    assert shared.is_broken and shared.renewed is not None, "or the limit was never met, and the test shows nothing"
    assert guides[-1].grammar is not shared


def test_a_text_that_is_too_much_alone_ends_after_all(make: Callable[..., Grammar]) -> None:
    lane = Kept()
    shared = make(WIDE, lexer_states=40)
    guides = [GrammarGuide(shared, lane) for _ in range(3)]
    for seed, guide in enumerate(guides):
        walk(guide, lane, seed, 40)
        assert "too many states" in guide.problem and "the limits are" in guide.problem
        assert not any(guide.allowed())


def test_new_texts_get_the_lexer_that_was_renewed(tokens: GuideMaker) -> None:
    async def grammar() -> Grammar:
        return (await tokens.guides([ITEMS], 1))[0].grammar

    first = asyncio.run(grammar())
    assert asyncio.run(grammar()) is first
    first.is_broken = True
    second = first.renew()
    assert asyncio.run(grammar()) is second and tokens.grammars.num_compiled == 1
    second.is_broken = True
    third = asyncio.run(grammar())
    assert third not in (first, second) and tokens.grammars.num_compiled == 2
