"""Questions to a larger model, several at a time, answered in any order; no more are prepared than are being answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from PIL import Image

from hooked_llava.checks import whole_number

Job = TypeVar("Job")
Answer = TypeVar("Answer")


Explainer: TypeAlias = Callable[[Sequence[Image.Image], str], str]
"""What answers a prompt about images, or about none. One with an attribute `concurrency` is called from so many threads."""


def concurrency_of(*explainers: Any) -> int:
    """How many calls may run at once: what the explainer that allows the fewest does, 1 where one says nothing."""
    return min(
        whole_number(getattr(one, "concurrency", 1), "explainer.concurrency", least=1)
        for one in explainers
        if one is not None
    )


def each_answered(
    jobs: Iterable[Job], answer: Callable[[Job], Answer], concurrency: int
) -> Iterator[tuple[Job, Answer]]:
    """Every job with its answer, as answers come; the jobs are drawn in the calling thread, so many at once at most.

    An error of one answer is raised when it comes; those that are being answered then are waited for, and given first.

    >>> list(each_answered([1, 2, 3], lambda job: job * job, 1))
    [(1, 1), (2, 4), (3, 9)]
    """
    if concurrency == 1:
        yield from ((job, answer(job)) for job in jobs)
        return
    drawn = iter(jobs)
    with ThreadPoolExecutor(concurrency) as threads:
        running: dict[Future[Answer], Job] = {}
        failed: BaseException | None = None
        while True:
            if failed is None:
                running |= {threads.submit(answer, job): job for job in islice(drawn, concurrency - len(running))}
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, error = running.pop(future), future.exception()
                if error is None:
                    yield job, future.result()
                failed = failed or error
        if failed is not None:
            raise failed
