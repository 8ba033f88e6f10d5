"""A server that runs, asked by the OpenAI-compatible API: tokens and their log-probabilities."""

from __future__ import annotations

import json
import math
import secrets
import threading
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from ..cli import UserError
from .report import printable

LIKELIEST = 20  # tokens; vLLM gives no more, without --max-logprobs
Answer = list[tuple[str, dict[str, float]]]
"""Each token that was chosen, and the log-probabilities of the likeliest."""


class RefusedError(UserError):
    """The server does not take a request."""


@dataclass(frozen=True, eq=False)
class Question:
    name: str
    content: Any
    """Of a chat's message: a text, or parts."""
    max_tokens: int


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for this server, and not for another that it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    def __init__(self, url: str, model: str | None, key: str, timeout: int):
        """`timeout`: seconds for which a request may be silent.

        Raises:
            UserError: it is no http address; or, without a `model`, the server names none.
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url}: begins with neither http:// nor https://")
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.headers = {"Content-Type": "application/json"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.opener, self.lock = urllib.request.build_opener(NoRedirect), threading.Lock()
        self.requests, self.answered = 0, False
        self.unsalted = ""
        """Why it is sent no cache_salt."""
        try:
            self.model: str = model or self._call("/v1/models")["data"][0]["id"]
        except (LookupError, TypeError):
            raise UserError(f"{self.url}/v1/models: names no model; give --model") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        url, data = self.url + path, None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, data, self.headers)
            with self.opener.open(request, timeout=self.timeout) as response:
                return json.load(response)
        except HTTPError as error:
            said = f"HTTP {error.code}: {printable(error.read(400).decode(errors='replace'))}"
            if error.code in (400, 422):
                raise RefusedError(said) from None
            hint = "; --api-key or OPENAI_API_KEY gives a key" if error.code in (401, 403) else ""
            raise UserError(f"{url}: {said}{hint}") from None
        except (OSError, ValueError, HTTPException) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise UserError(f"{url}: no answer in {self.timeout} s; see --timeout") from None
            raise UserError(f"{url}: no answer from an OpenAI server: {error}") from None

    def _chat(self, question: Question) -> Any:
        message = {"role": "user", "content": question.content}
        body = {"model": self.model, "messages": [message], "max_tokens": question.max_tokens}
        body |= {"temperature": 0, "seed": 0, "ignore_eos": True, "logprobs": True}
        body |= {"top_logprobs": LIKELIEST, "return_tokens_as_token_ids": True}
        # With the same salt, it would be given what the prefix cache has kept of it.
        body |= {} if self.unsalted else {"cache_salt": secrets.token_hex(16)}
        with self.lock:
            self.requests += 1
        return self._call("/v1/chat/completions", body)

    def ask(self, question: Question) -> Answer:
        """
        Raises:
            RefusedError: the server does not take it; its first one, neither without a cache_salt.
            UserError: no answer, or one without the log-probabilities of token ids.
        """
        try:
            try:
                reply = self._chat(question)
            except RefusedError as error:
                if self.answered:
                    raise
                self.unsalted = str(error)
                reply = self._chat(question)
        except RefusedError as error:
            raise RefusedError(f"{self.url} refuses {question.name}: {error}") from None
        try:
            answer = parse(reply)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{self.url}: {question.name}: no log-probabilities of token ids in the answer: it "
                f"needs logprobs, top_logprobs {LIKELIEST}, return_tokens_as_token_ids, as vLLM has"
            ) from None
        self.answered = True
        return answer

    def ask_all(self, questions: Iterable[Question], at_once: int = 1) -> list[Answer]:
        """In their order; raises what `ask` does."""
        if at_once == 1:
            return [self.ask(question) for question in questions]  # and none after one that fails
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.ask, questions))


def parse(reply: Any) -> Answer:
    """
    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not what was asked for.
    """
    answer: Answer = []
    for step in reply["choices"][0]["logprobs"]["content"]:
        tops = {top["token"]: float(top["logprob"]) for top in step["top_logprobs"]}
        ids = all(token.startswith("token_id:") for token in tops)
        if not ids or step["token"] not in tops or not all(map(math.isfinite, tops.values())):
            raise ValueError(step)
        answer.append((step["token"], tops))
    if not answer:
        raise ValueError("no tokens")
    return answer


def apart(ours: Answer, theirs: Answer) -> float:
    """Largest |Δ log-probability| of tokens that are among the likeliest in both, up to the first
    step in which another one is chosen; infinite where a step has none in both."""
    largest = 0.0
    for (token, a), (other, b) in zip(ours, theirs):
        both = a.keys() & b.keys()
        if not both:
            return math.inf
        largest = max(largest, *(abs(a[each] - b[each]) for each in both))
        if token != other:
            # What is not among the other's likeliest is at most as likely as their last.
            return max(
                largest,
                a[token] - b.get(token, min(b.values())),
                b[other] - a.get(other, min(a.values())),
            )
    return largest
