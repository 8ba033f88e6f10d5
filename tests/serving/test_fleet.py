"""Which engines live while a test on a GPU runs. They are made up here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import fleet
from tests.fleet import Case, Fleet, Mode, by_engine

ONE, TWO = Mode("one"), Mode("two", releases=">=99", lacking="no release has it")


class MadeUp:
    def __init__(self) -> None:
        self.over = False

    def ended(self) -> bool:
        return self.over

    def stop(self) -> None:
        self.over = True


def item(name: str, case: Case | None = None):
    return SimpleNamespace(
        nodeid=name, callspec=SimpleNamespace(params={"case": case} if case else {})
    )


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A fleet of made-up engines; tests named `large` need more GPUs than there are."""
    monkeypatch.setattr(fleet, "missing_gpus", lambda item: item.nodeid.startswith("large"))
    monkeypatch.setattr(fleet, "version", lambda: "0.33.0")
    monkeypatch.setattr(fleet, "AHEAD", 4)
    monkeypatch.setattr(Fleet, "_checkpoint", lambda self, model: Path(model))
    monkeypatch.setattr(Fleet, "_start", lambda self, case: MadeUp())
    return lambda items: Fleet(items, tmp_path)


def alive(made: Fleet) -> set[str]:
    return {str(case) for case in made.engines}


def test_engines_start_ahead_and_stop_when_no_test_needs_them(make):
    items = [item(name, Case(name, ONE)) for name in "abc"]
    made = make(items)
    made.before(items[0])
    assert alive(made) == {"a-eager", "a-one", "b-eager", "b-one"}
    made.after(items[0], failed=False)
    assert alive(made) == {"b-eager", "b-one"}
    made.before(items[1])
    assert alive(made) == {"b-eager", "b-one", "c-eager", "c-one"}


def test_tests_of_one_engine_are_neighbors_and_share_it(make):
    items = by_engine([item("1", Case("a", ONE)), item("2"), item("3", Case("a", ONE))])
    assert [one.nodeid for one in items] == ["1", "3", "2"]
    made = make(items)
    made.before(items[0])
    engines = dict(made.engines)
    made.after(items[0], failed=False)
    made.before(items[1])
    assert made.engines == engines


def test_an_engine_that_ended_is_started_anew(make):
    items = [item("1", Case("a", ONE)), item("2", Case("a", ONE))]
    made = make(items)
    made.before(items[0])
    eager = made.engines[Case("a", ONE).eager]
    made.engines[Case("a", ONE)].over = True
    made.after(items[0], failed=False)
    made.before(items[1])
    assert not made.engines[Case("a", ONE)].over
    assert made.engines[Case("a", ONE).eager] is eager


def test_engines_of_a_test_that_failed_are_not_used_again(make):
    items = [item("1", Case("a", ONE)), item("2", Case("a", ONE))]
    made = make(items)
    made.before(items[0])
    made.after(items[0], failed=True)
    assert not made.engines


def test_what_cannot_run_starts_nothing(make):
    items = [item("large", Case("a", ONE)), item("2", Case("b", TWO)), item("3")]
    made = make(items)
    for one in items:
        made.before(one)
        assert not made.engines
        made.after(one, failed=False)
    with pytest.raises(pytest.skip.Exception, match=r"vLLM 0\.33\.0: no release has it"):
        made.engine(Case("b", TWO))


def test_a_checkpoint_that_cannot_be_made_fails_its_tests_alone(make):
    made = make([item("1", Case("a", ONE)), item("2", Case("b", ONE))])
    made.broken["a"] = "no such class"
    made.before(item("1"))
    assert alive(made) == {"b-eager", "b-one"}
    with pytest.raises(pytest.fail.Exception, match="no such class"):
        made.engine(Case("a", ONE))
