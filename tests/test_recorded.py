"""The search gives what it gave when ``recorded/search.json`` was written: tokens, scores, and every call of every strategy."""

import json

import pytest
import recorded


@pytest.fixture(scope="module")
def expected():
    return json.loads(recorded.FILE.read_text())


def test_all_runs_are_recorded(expected):
    assert list(expected) == list(recorded.runs())


@pytest.mark.parametrize("name", recorded.runs())
def test_a_run_gives_what_it_gave(name, expected):
    checkpoint, strategy, settings = recorded.runs()[name]
    found = recorded.record(recorded.reflective_model(**checkpoint), strategy, settings)
    for was, is_ in zip(expected[name], found, strict=True):
        assert is_["calls"] == was["calls"]
        for c, other in zip(is_.pop("candidates"), was.pop("candidates"), strict=True):
            # Another processor sums in another order.
            for key in ("log_prob", "score", "steps"):
                assert c.pop(key) == pytest.approx(other.pop(key), rel=1e-3, abs=1e-5)
            assert c == other
        assert is_ == was
