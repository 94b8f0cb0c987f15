"""The loop and the strategies on an engine whose tokens and scores stand in a table: decisions checked by hand, in milliseconds."""

from dataclasses import dataclass, field

import pytest
from scripted import ScriptedEngine, ids, reader

from reflective.search.candidates import Ask, Question
from reflective.search.loop import Search
from reflective.search.strategies import ANSWER, HOLD, KEEP, NAMES, STOP, Strategy, by_name


@dataclass
class Turns(Strategy):
    """Says what stands in ``says``, a list a turn, and keeps what it was shown."""

    n: int = 2
    says: list[list[int]] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)

    def observe(self, step):
        self.shown.append(
            [f"{c.text}{'*' * changed}" for c, changed in zip(step.candidates, step.changed, strict=True)]
        )
        return self.says.pop(0) if self.says else None


def run(texts, strategy=None, *, engine=None, on_step=None, settings=None, **asked):
    """One question, of which candidate c draws ``texts[c]``; the question afterwards, and the engine."""
    engine = engine or ScriptedEngine(lambda seed: texts[seed[2]])
    asked = {"again": lambda text: ids("?" + text)} | asked
    ask = Ask(ids("?"), strategy or by_name("best_of_n", n=len(texts)), **asked)
    (question,) = Search(engine, reader(**settings or {}), on_step=on_step).run([ask])
    assert not engine.entered and not engine.sequences and not engine.prefixes
    return question, engine


def texts_of(question):
    return [c.text for c in question.candidates]


def test_candidates_end_as_the_engine_says_and_have_its_scores():
    q, engine = run(["a5b8$", "abcdefgh", "$"], max_new_tokens=6)
    assert texts_of(q) == ["a5b8", "abcdef", ""]
    assert [c.status for c in q.candidates] == ["stop", "length", "stop"]
    assert [c.new_tokens for c in q.candidates] == [5, 6, 1] and q.tokens == 12
    assert [c.log_prob for c in q.candidates] == [-5, -6, -1]
    assert q.candidates[0].step_scores == [0.5, 0.8] and q.candidates[0].scored.positions == [1, 3]
    assert q.candidates[0].score("geometric_mean") == pytest.approx(0.4**0.5)
    assert [n for _, n in q.alive] == [3, 2, 2, 2, 2, 1, 0]
    assert engine.calls == [("close", 1)], "who does not look at steps says nothing to the engine"


def test_a_stop_text_ends_a_candidate():
    q, engine = run(["a5bXYc9$", "ab5$"], stop=["XY"])
    assert texts_of(q) == ["a5bXY", "ab5"] and engine.calls[0] == ("stop", ["a5bXY"])
    assert [c.status for c in q.candidates] == ["stop", "stop"] and q.candidates[0].step_scores == [0.5]
    q, engine = run(["aXY", "b$"], stop=["XY"], max_new_tokens=3)
    assert q.candidates[0].status == "stop" and engine.calls == [("close", 1)], "it had ended by its length already"


def test_an_answer_with_something_behind_it_is_complete():
    q, _ = run(["=7;more", "<=7;>=8;x"], settings={"pattern": "=([0-9])"})
    assert texts_of(q) == ["=7;", "<=7;>=8;"] and [c.answer for c in q.candidates] == ["7", "8"]


def test_thinking_is_ended_at_its_budget():
    texts = ["<abcdef", "<a>b$", "xyz$"]
    q, engine = run(texts, thinking_budget=3, max_new_tokens=9)
    assert texts_of(q) == ["<ab>def", "<a>b", "xyz>"]
    assert ("force", "<ab") in engine.calls and ("force", "<a>") not in engine.calls
    q, engine = run(["abc$"], thinking_budget=0)
    assert texts_of(q) == [">bc"] and engine.calls[0] == ("force", "")
    engine = ScriptedEngine(lambda seed: "a$")
    with pytest.raises(ValueError, match="thinking_budget"):
        Search(engine, reader().__class__(reader().tokenizer)).run([Ask([1], by_name("best_of_n"), thinking_budget=2)])


@pytest.mark.parametrize("late", [True, False])
def test_a_strategy_meets_a_candidate_at_the_end_of_its_step(late):
    strategy = Turns(n=2, says=[[3, KEEP], [KEEP] * 4, [STOP, KEEP, KEEP, KEEP]])
    texts = ["a1bbbbb2$", "aaa4$", "ZZccccc3$", "ZZdd5$"]
    q, engine = run(texts, strategy, engine=ScriptedEngine(lambda seed: texts[seed[2]], late=late))
    assert q.strategy.shown[0] == ["a1*", "aa" + "a" * late], "nothing of what lies behind the step"
    assert engine.calls[0] == ("fork", ("a1", 2))
    assert [c.parent for c in q.candidates] == [None, None, 0, 0]
    assert [c.new_tokens for c in q.candidates[2:]] == [7, 4], "of its own, the parent's not counted"
    assert texts_of(q)[2:] == ["a1ccccc3", "a1dd5"], "forks draw by their own seeds"
    assert q.tokens == sum(c.new_tokens for c in q.candidates)


def test_held_candidates_rest_and_go_on():
    strategy = Turns(n=2, says=[[HOLD, KEEP], [KEEP, KEEP]])
    q, engine = run(["1a$", "bbb2c$"], strategy)
    assert q.strategy.shown[:2] == [["1*", "bb"], ["1", "bbb2*"]]
    assert engine.calls[:2] == [("rest", ["1"]), ("resume", ["1"])]
    assert texts_of(q) == ["1a", "bbb2c"]


def test_who_holds_all_for_ever_is_told():
    class Stubborn(Turns):
        def observe(self, step):
            return [HOLD] * len(step.candidates)

    with pytest.raises(RuntimeError, match="Stubborn: it holds every candidate"):
        run(["1a$", "2b$"], Stubborn())


@pytest.mark.parametrize("late", [True, False])
def test_a_strategy_ends_thinking(late):
    strategy = Turns(n=3, says=[[ANSWER, KEEP, KEEP], [KEEP, ANSWER, KEEP]])
    texts = ["<a1bbbbb2$", "<aaa>4bb$", "<cccccc$"]
    q, engine = run(texts, strategy, engine=ScriptedEngine(lambda seed: texts[seed[2]], late=late))
    assert texts_of(q) == ["<a1>bbbb2", "<aaa>4bb", "<cccccc"], "in place of what would have come; who has ended is left alone"
    assert [call for call in engine.calls if call[0] == "force"] == [("force", "<a1")]
    held = Turns(n=2, says=[[HOLD, KEEP], [ANSWER, KEEP]])
    q, engine = run(["<1aa$", "<bbb2c$"], held)
    assert texts_of(q) == ["<1>a", "<bbb2c"], "one that rests goes on with it"
    with pytest.raises(RuntimeError, match="Turns: it has candidates end their thinking, and the tokenizer has no </think>"):
        engine = ScriptedEngine(lambda seed: "1a$")
        Search(engine, reader().__class__(reader().tokenizer)).run([Ask([1], Turns(n=1, says=[[ANSWER]]))])


def test_a_strategy_has_further_candidates_begin():
    class Wanting(Turns):
        begins_with = 1

        def observe(self, step):
            step.fresh = 2 if len(step.candidates) == 1 and step.candidates[0].finished else 0
            return super().observe(step)

    texts = ["a5$", "<bb$", "c7c$"]
    q, _ = run(texts, Wanting(n=3), temperature=[0.1, 0.2], thinking_budget=1, max_new_tokens=6)
    assert len(q.candidates) == 3 and q.tokens == sum(c.new_tokens for c in q.candidates)
    assert [c.temperature for c in q.candidates] == [0.1, 0.2, 0.1] and [c.parent for c in q.candidates] == [None] * 3
    assert [c.text[1] for c in q.candidates[1:]] == [">", ">"], "forced as the first ones are"


def test_by_step_waits_for_the_slowest():
    strategy = Turns(n=3, by_step=True)
    q, engine = run(["1a$", "bb2$", "$"], strategy)
    assert q.strategy.shown[0] == ["1*", "bb2*", "*"]
    assert engine.calls[:2] == [("rest", ["1"]), ("resume", ["1"])], "once each, and nothing of who never waited"


def test_stopped_candidates_are_scored_where_they_are():
    q, engine = run(["a5bb$", "b7cc$"], Turns(says=[[STOP, KEEP]]))
    assert [(c.text, c.status, c.step_scores) for c in q.candidates] == [
        ("a5", "stopped", [0.5]), ("b7cc", "stop", [0.7]),
    ]  # fmt: skip
    assert engine.calls[0] == ("stop", ["a5"]) and q.candidates[0].finished is None


def test_a_finished_candidate_may_be_forked_and_costs_nothing():
    q, engine = run(["5$", "aaaa6$"], Turns(says=[[KEEP, KEEP], [2, KEEP]]))
    assert texts_of(q) == ["5", "aaaa6", "5"] and q.candidates[2].new_tokens == 0 and q.candidates[2].parent == 0
    assert not any(verb == "fork" for verb, _ in engine.calls)


@pytest.mark.parametrize("says", [[[KEEP]], [[KEEP, -3]]])
def test_actions_that_are_none(says):
    engine = ScriptedEngine(lambda seed: "5a$")
    with pytest.raises(RuntimeError, match="Turns: observe gave"):
        run(["5a$"] * 2, Turns(says=says), engine=engine)
    assert not engine.entered


def test_questions_come_as_places_fall_free():
    engine = ScriptedEngine(lambda seed: "abc$" if seed[1] else "a$", places=2)
    asks = [Ask(ids("?"), by_name("best_of_n", n=2), number=i) for i in range(3)]
    told = []
    search = Search(engine, reader(), on_end=lambda q: told.append(q.ask.number))
    found = search.run(asks)
    assert told == [0, 1, 2] and [texts_of(q) for q in found] == [["a"] * 2, ["abc"] * 2, ["abc"] * 2]
    assert engine.calls == [("close", 1)] * 3


def test_on_step_sees_scores_even_where_the_strategy_does_not_look():
    seen = []
    run(["5ab6$"], on_step=lambda questions: seen.append(list(questions[0][0].step_scores)))
    assert seen == [[], [], [0.5], [0.5], [0.5], [0.5, 0.6]]


def test_a_question_can_be_cancelled():
    engine = ScriptedEngine(lambda seed: "ab5cdefgh$")
    search, ended = Search(engine, reader()), []
    search.on_end = ended.append
    asked, other = (Question(reader(), Ask(ids("?"), by_name("best_of_n", n=2), number=i)) for i in range(2))
    queue = [asked, other]

    def arrivals(room):
        asked.cancelled = engine.advances == 3
        return [queue.pop(0)] if queue else []

    search.serve(arrivals)
    assert [(c.text, c.status, c.step_scores) for c in asked.candidates] == [("ab", "interrupted", [])] * 2
    assert [c.status for c in other.candidates] == ["stop"] * 2 and ended == [asked, other]


def test_an_interrupted_run_is_scored_as_far_as_it_came():
    def look(questions):
        if questions[0][0].new_tokens == 3:
            raise KeyboardInterrupt

    engine = ScriptedEngine(lambda seed: "ab5cdefgh$")
    (q,) = Search(engine, reader(), on_step=look).run([Ask(ids("?"), by_name("best_of_n", n=2))])
    assert [(c.text, c.status, c.step_scores) for c in q.candidates] == [("ab5", "interrupted", [0.5])] * 2
    assert not engine.entered


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_ends_with_a_finished_answer_on_any_engine(name, late):
    """Whenever it tells of a step: strategies that go by steps say the same."""

    def script(seed):
        c = seed[2]
        return "".join("ab"[: 1 + (c + k) % 2] + str(1 + (7 * c + 3 * k * k) % 9) for k in range(3 + c % 3)) + "$"

    given = {"prune": {"threshold": 0.4}, "select": {"exponent": 4.0}, "replace": {"interval": 3, "warmup": 3}, "exit": {"threshold": 0.6}, "auto": {"exponent": 4.0, "enough": 0.95}}.get(name, {})
    strategy = by_name(name, n=4, **given)
    q, _ = run([script((0, 0, c)) for c in range(400)], strategy, engine=ScriptedEngine(script, late=late))
    chosen = q.strategy.choose(
        [type("Ended", (), vars(c) | {"answer": None, "text": c.text, "score": c.scored.score}) for c in q.candidates]
    )
    assert q.candidates[chosen].finished == "stop" and len(q.candidates) >= 4
    if strategy.by_step:
        again, _ = run([script((0, 0, c)) for c in range(400)], strategy, engine=ScriptedEngine(script))
        assert [(c.text, c.parent, c.status) for c in q.candidates] == [
            (c.text, c.parent, c.status) for c in again.candidates
        ]
