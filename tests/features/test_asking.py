"""Jobs are answered several at a time, and no more are drawn than are being answered."""

from __future__ import annotations

import threading

import pytest

from hooked_llava.errors import InputError
from hooked_llava.features.asking import concurrency_of, each_answered

WAIT = 20


def test_all_are_answered_whatever_the_number_at_once() -> None:
    for concurrency in (1, 2, 7, 50):
        assert sorted(each_answered(range(20), lambda job: job * job, concurrency)) == [(i, i * i) for i in range(20)]
    assert list(each_answered([], str, 3)) == []


def test_so_many_run_at_once() -> None:
    met = threading.Barrier(4)
    answered = list(each_answered(range(8), lambda job: met.wait(WAIT) >= 0, 4))
    assert len(answered) == 8, "four at a time meet, or the barrier breaks"


def test_no_more_are_drawn_than_run() -> None:
    drawn: list[int] = []
    for done, _ in enumerate(each_answered((drawn.append(i) or i for i in range(30)), str, 3)):
        assert len(drawn) <= done + 1 + 3


def test_what_was_answered_comes_before_the_error() -> None:
    def answer(job: int) -> int:
        met.wait(WAIT)
        if job == 1:
            raise ValueError("job 1")
        return job

    met = threading.Barrier(3)
    found: list[int] = []
    with pytest.raises(ValueError, match="job 1"):
        found.extend(job for job, _ in each_answered(range(30), answer, 3))
    assert sorted(found) == [0, 2]


def test_concurrency_is_the_least_that_one_allows() -> None:
    class Several:
        concurrency = 4

    assert concurrency_of(Several(), None) == 4
    assert concurrency_of(Several(), str) == 1
    Several.concurrency = 0
    with pytest.raises(InputError, match=r"concurrency=0"):
        concurrency_of(Several())
