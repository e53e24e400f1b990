"""The explainer behind a server, against a real one on this machine that answers, fails, stalls and talks nonsense."""

from __future__ import annotations

import base64
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hooked_llava.errors import ExplainerError, InputError
from hooked_llava.features.explainers import server as module
from hooked_llava.features.explainers.server import ServerExplainer
from tests.features.explainers.fake_server import Body, Reply, serving

pytest.importorskip("openai")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
BUSY, BROKEN = Reply(status=429, raw='{"error": {"message": "busy"}}'), Reply(status=500, raw="<html>oops</html>")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing waits here; what it would have waited is kept."""
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


def explainer(url: str, **options: Any) -> ServerExplainer:
    return ServerExplainer("tiny", url, **options)


def test_what_is_sent_is_the_prompt_and_then_the_images() -> None:
    with serving(lambda number, body: Reply(" The train \n")) as served:
        images = [Image.fromarray(PIXELS), Image.new("L", (3, 3), 7)]
        assert explainer(served.url, max_tokens=9, temperature=0.5)(images, "What is it?") == "The train"
    (request,) = served.requests
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("tiny", 9, 0.5)
    (message,) = request["messages"]
    text, first, second = message["content"]
    assert text == {"type": "text", "text": "What is it?"}
    assert (np.asarray(decoded(first)) == PIXELS).all()
    assert decoded(second).size == (3, 3)


def decoded(part: Body) -> Image.Image:
    kind, _, data = part["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_without_images_the_prompt_is_all() -> None:
    with serving(lambda number, body: Reply("object")) as served:
        assert explainer(served.url)([], "Which?") == "object"
    assert served.requests[0]["messages"] == [{"role": "user", "content": "Which?"}]


@pytest.mark.parametrize("failure", [BUSY, BROKEN, Reply(status=503), Reply(status=408)], ids=lambda r: str(r.status))
def test_a_server_that_fails_is_asked_again(failure: Reply, waits: list[float]) -> None:
    with serving(lambda number, body: failure if number < 3 else Reply()) as served:
        one = explainer(served.url, retries=3, first_wait=1.0)
        assert one([], "?") == "fine"
    assert one.n_requests == len(served.requests) == 4
    assert [0.5 * 2**i <= waited <= 2**i for i, waited in enumerate(waits)] == [True] * 3, waits


NONSENSE = {
    "a page": Reply(raw="<html>welcome</html>", headers={"Content-Type": "text/html"}),
    "no JSON": Reply(raw="{{{"),
    "no choices": Reply(raw='{"choices": []}'),
    "null choices": Reply(raw='{"choices": null}'),
    "a list": Reply(raw="[1, 2]"),
    "a number": Reply(raw="7"),
    "no message": Reply(raw='{"choices": [{"message": null}]}'),
    "no content": Reply(raw='{"choices": [{"message": {"content": null}}]}'),
    "no text": Reply(raw='{"choices": [{"message": {"content": [1]}}]}'),
    "empty": Reply("  "),
    "nothing": Reply(raw=""),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_no_answer(name: str) -> None:
    with serving(lambda number, body: NONSENSE[name] if number < 2 else Reply()) as served:
        assert explainer(served.url, retries=2)([], "?") == "fine"
        assert len(served.requests) == 3
    with (
        serving(lambda number, body: NONSENSE[name]) as served,
        pytest.raises(ExplainerError, match=r"tiny.*127\.0\.0\.1.*2 tries"),
    ):
        explainer(served.url, retries=1)([], "?")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_the_server_refuses_is_not_sent_again(status: int, waits: list[float]) -> None:
    refused = Reply(status=status, raw='{"error": {"message": "no model tiny"}}')
    with serving(lambda number, body: refused) as served, pytest.raises(ExplainerError, match=rf"tiny.*{status}"):
        explainer(served.url)([], "?")
    assert len(served.requests) == 1
    assert waits == []


def test_a_stalled_server_is_asked_again() -> None:
    never = Reply(hold=threading.Event())
    with serving(lambda number, body: never if number == 0 else Reply()) as served:
        assert explainer(served.url, timeout=0.3)([], "?") == "fine"
    assert len(served.requests) == 2


def test_a_server_that_is_not_there() -> None:
    with serving(lambda number, body: Reply()) as served:
        pass
    with pytest.raises(ExplainerError, match=r"3 tries") as caught:
        explainer(served.url, retries=2, timeout=5)([], "?")
    assert served.url in str(caught.value)


def test_the_server_says_how_long_to_wait(waits: list[float]) -> None:
    def reply(number: int, body: Body) -> Reply:
        asked = ("7", "4000", "soon", "-1")
        return Reply(status=429, headers={"Retry-After": asked[number]}, raw="{}") if number < 4 else Reply()

    with serving(reply) as served:
        explainer(served.url, first_wait=1.0, max_wait=60.0)([], "?")
    assert waits[:2] == [7.0, 60.0]
    assert 2.0 <= waits[2] <= 4.0, "what is no number is not followed"
    assert waits[3] == 0.0


def test_tries_count_towards_the_limit() -> None:
    with serving(lambda number, body: BUSY if number == 1 else Reply()) as served:
        one = explainer(served.url, max_requests=3)
        assert [one([], "?"), one([], "?")] == ["fine", "fine"]
        with pytest.raises(ExplainerError, match=r"max_requests=3"):
            one([], "?")
    assert len(served.requests) == one.n_requests == 3


def test_the_limit_holds_among_threads() -> None:
    def tried(_: int) -> str:
        try:
            return one([], "?")
        except ExplainerError as error:
            return str(error)

    with serving(lambda number, body: Reply()) as served:
        one = explainer(served.url, max_requests=5, concurrency=8)
        with ThreadPoolExecutor(12) as threads:
            found = list(threads.map(tried, range(12)))
    assert (found.count("fine"), len(served.requests)) == (5, 5)


def test_so_many_are_under_way_and_no_more() -> None:
    """Three requests wait for each other at the server; with a fourth the count would be four."""
    together, lock = threading.Barrier(3), threading.Lock()
    under_way, most = 0, 0

    def reply(number: int, body: Body) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(30)
        with lock:
            under_way -= 1
        return Reply()

    with serving(reply) as served:
        one = explainer(served.url, concurrency=3)
        with ThreadPoolExecutor(9) as threads:
            assert list(threads.map(lambda _: one([], "?"), range(9))) == ["fine"] * 9
    assert most == 3


def test_the_key_goes_where_it_is_meant_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-service")
    with serving(lambda number, body: Reply()) as served:
        explainer(served.url)([], "?")
        explainer(served.url, api_key="own")([], "?")
        monkeypatch.setenv("OPENAI_BASE_URL", served.url)
        ServerExplainer("tiny")([], "?")
    assert served.keys == ["Bearer none", "Bearer own", "Bearer key-of-the-service"]


def test_a_service_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"base_url=None"):
        ServerExplainer("tiny")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"openai.*hooked_llava\[explain\]"):
        ServerExplainer("tiny", "http://localhost:1/v1")


@pytest.mark.parametrize(
    ("option", "value"),
    [("concurrency", 0), ("retries", -1), ("max_requests", 0), ("timeout", float("nan")), ("first_wait", -1.0)],
)
def test_bad_options(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{option}={value}"):
        ServerExplainer("tiny", "http://localhost:1/v1", **{option: value})
