"""A model behind a server that speaks OpenAI's protocol, as an explainer: vLLM, SGLang, or a service."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from threading import BoundedSemaphore, Lock
from typing import Any

from PIL import Image

from hooked_llava.checks import finite_number, whole_number
from hooked_llava.errors import ExplainerError, InputError, counted

_AGAIN = (408, 409, 429)
"""Statuses after which the same request may succeed, besides 500 and above."""
_SHOWN = 200


class ServerExplainer:
    """A model behind an OpenAI-compatible server that answers prompts about images; needs `pip install 'hooked_llava[explain]'`.

    Several threads may call it; `explain_features` does, `concurrency` of them. A request that fails because the server is busy,
    down, slow or answers nonsense is sent again, after waits that double; one that the server refuses is not. Raises
    `ExplainerError` when that was the last try, and when `max_requests` have been sent.

    Args:
        model: the model's name on the server.
        base_url: the server's address, such as "http://localhost:8000/v1"; by default OPENAI_BASE_URL, or OpenAI's.
        api_key: by default OPENAI_API_KEY, which is not sent to a base_url that is given.
        concurrency: requests under way at most.
        timeout: seconds that an answer may take.
        retries: how often a request is sent again.
        first_wait: seconds before that, doubled each time, less up to half at random; what the server asks for goes first.
        max_wait: seconds of a wait at most.
        max_requests: so many are sent in all, tries included; None for any number.
        max_tokens: so long is an answer at most.
        options: further fields of a request, such as temperature=0.0.

    Raises `InputError` without the package openai.

    >>> explainer = ServerExplainer("my-model", base_url="http://localhost:8000/v1", max_requests=1000)
    >>> explainer.concurrency, explainer.n_requests
    (8, 0)
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        first_wait: float = 1.0,
        max_wait: float = 60.0,
        max_requests: int | None = None,
        max_tokens: int = 256,
        **options: Any,
    ) -> None:
        self.model, self.options = model, {"max_tokens": whole_number(max_tokens, "max_tokens", least=1), **options}
        self.concurrency = whole_number(concurrency, "concurrency", least=1)
        self.retries = whole_number(retries, "retries", least=0)
        self.first_wait = finite_number(first_wait, "first_wait", least=0.0)
        self.max_wait = finite_number(max_wait, "max_wait", least=0.0)
        self.max_requests = None if max_requests is None else whole_number(max_requests, "max_requests", least=1)
        self.n_requests = 0
        self._counting, self._under_way = Lock(), BoundedSemaphore(self.concurrency)
        self._client = _client(base_url, api_key, finite_number(timeout, "timeout", least=0.0))
        self.address = str(self._client.base_url)

    def __call__(self, images: Sequence[Image.Image], prompt: str) -> str:
        """The model's answer to a prompt that is followed by images, perhaps none."""
        content = [{"type": "text", "text": prompt}, *map(_image_part, images)]
        messages = [{"role": "user", "content": content if images else prompt}]
        with self._under_way:
            return self._tried(lambda: self._sent(messages))

    def _tried(self, send: Callable[[], str]) -> str:
        wait = self.first_wait
        for tries_left in range(self.retries, -1, -1):
            try:
                return send()
            except _FailedRequestError as failed:
                if not tries_left or not failed.may_succeed:
                    said = "" if not failed.may_succeed else f" in {counted(self.retries + 1, 'try', 'tries')}"
                    raise ExplainerError(
                        f"{self.model} at {self.address} gave no answer{said}: {failed}. Check the server and the "
                        "model's name; the same call goes on where it was."
                    ) from failed.__cause__
                asked_for = failed.wait if failed.wait is not None else wait * random.uniform(0.5, 1)
                time.sleep(min(asked_for, self.max_wait))
                wait *= 2
        raise AssertionError  # the last try returns or raises

    def _sent(self, messages: Sequence[dict[str, Any]]) -> str:
        """One request's answer; raises `_FailedRequestError`."""
        import openai

        self._count()
        try:
            reply = self._client.chat.completions.create(model=self.model, messages=messages, **self.options)
        except openai.APIStatusError as error:
            again = error.status_code in _AGAIN or error.status_code >= 500
            raise _FailedRequestError(
                f"status {error.status_code}, {error.message}", again, _retry_after(error)
            ) from error
        except openai.APIConnectionError as error:  # a timeout is one
            raise _FailedRequestError(str(error)) from error
        except (openai.APIError, ValueError) as error:  # what is no JSON
            raise _FailedRequestError(f"what came is no answer ({error})") from error
        text = _text_of(reply)
        if not text:
            raise _FailedRequestError(f"what came is no answer ({reply!r:.{_SHOWN}})")
        return text

    def _count(self) -> None:
        with self._counting:
            if self.max_requests is not None and self.n_requests >= self.max_requests:
                raise ExplainerError(
                    f"max_requests={self.max_requests} have been sent to {self.address}; a new explainer may send more, and "
                    "the same call then goes on where it was."
                )
            self.n_requests += 1


class _FailedRequestError(Exception):
    """One request that brought no answer."""

    def __init__(self, why: str, may_succeed: bool = True, wait: float | None = None) -> None:
        super().__init__(why.rstrip(". ") if len(why) <= _SHOWN else f"{why[:_SHOWN]}...")
        self.may_succeed, self.wait = may_succeed, wait


def _client(base_url: str | None, api_key: str | None, timeout: float) -> Any:
    try:
        import openai
    except ImportError as error:
        raise InputError(
            "ServerExplainer needs the package openai, which is not installed: pip install 'hooked_llava[explain]'."
        ) from error
    local = base_url is not None and api_key is None
    try:
        return openai.OpenAI(base_url=base_url, api_key="none" if local else api_key, timeout=timeout, max_retries=0)
    except openai.OpenAIError as error:
        raise InputError(f"base_url={base_url!r}, api_key {'not ' if api_key is None else ''}given: {error}") from error


def _image_part(image: Image.Image) -> dict[str, Any]:
    """An image in a message, as PNG."""
    written = BytesIO()
    image.convert("RGB").save(written, format="PNG")
    encoded = base64.b64encode(written.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def _text_of(reply: Any) -> str:
    """The text of a reply, or "" where it has none."""
    try:
        content = reply.choices[0].message.content
    except (AttributeError, IndexError, TypeError, KeyError):
        return ""
    return content.strip() if isinstance(content, str) else ""


def _retry_after(error: Any) -> float | None:
    """The seconds that the server asks to wait, where it says a number of them."""
    try:
        return max(float(error.response.headers["retry-after"]), 0.0)
    except (KeyError, ValueError):
        return None
