"""Requests that want their answer whole are told it once, and nothing of it is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from worker.engines.whole_answers import WholeAnswers


@dataclass
class Output:
    """The fields of vLLM's EngineCoreOutput that matter here."""

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_stats: Any = None


def test_an_answer_is_told_once_with_all_its_tokens_and_what_its_first_step_said() -> None:
    """The last output carries every token in order, and how much of the prompt was in the cache."""
    whole = WholeAnswers()
    whole.expect("a")
    assert whole.join([Output("a", [1], prefill_stats="cached 16")]) == []
    assert whole.join([Output("a", [2, 3])]) == []
    assert whole.join([Output("a", [4], finish_reason="stop")]) == [Output("a", [1, 2, 3, 4], "stop", "cached 16")]


def test_an_answer_of_one_step_is_told_as_it_is() -> None:
    """Its only output has the tokens, the reason and the prefill."""
    whole = WholeAnswers()
    whole.expect("a")
    only = Output("a", [1], finish_reason="length", prefill_stats="none")
    assert whole.join([only]) == [Output("a", [1], "length", "none")]


def test_who_wants_each_token_gets_each_token() -> None:
    """Outputs of requests that were not announced pass, beside others that are held back."""
    whole = WholeAnswers()
    whole.expect("whole")
    streamed = Output("stream", [7])
    assert whole.join([Output("whole", [1]), streamed]) == [streamed]


def test_a_request_that_is_forgotten_leaves_nothing_behind() -> None:
    """After an abort the same id, used again for a stream, is told at once."""
    whole = WholeAnswers()
    whole.expect("a")
    whole.join([Output("a", [1])])
    whole.forget(["a", "never seen"])
    assert whole.join([Output("a", [2])]) == [Output("a", [2])]


def test_the_tokens_of_the_engine_are_not_changed() -> None:
    """The engine may keep the list that it has given."""
    whole = WholeAnswers()
    whole.expect("a")
    first = [1]
    whole.join([Output("a", first)])
    whole.join([Output("a", [2], finish_reason="stop")])
    assert first == [1]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=3))),
    st.sets(st.sampled_from("abc")),
)
def test_whatever_the_steps_each_request_says_what_it_said(
    steps: list[tuple[str, list[int]]], announced: set[str]
) -> None:
    """Any interleaving: the tokens told are the tokens given, in order, and the announced are told once."""
    whole = WholeAnswers()
    for request_id in announced:
        whole.expect(request_id)
    told = [found for name, tokens in steps for found in whole.join([Output(name, list(tokens))])]
    told += whole.join([Output(name, [], finish_reason="stop") for name in "abc"])
    for name in "abc":
        mine = [output.new_token_ids for output in told if output.request_id == name]
        assert [token for tokens in mine for token in tokens] == [
            token for found, tokens in steps if found == name for token in tokens
        ]
        assert name not in announced or len(mine) == 1
