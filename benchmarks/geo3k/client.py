"""The run on endpoints: of `vllm serve`, or of anything else that speaks OpenAI's protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import openai

from vllm_deepstack.cli import UserError

from .answers import Answers, Asked


async def serve_run(
    base_urls: list[str],
    model: str | None,
    asked: list[Asked],
    max_tokens: int,
    concurrency: int,
    result: Path,
) -> None:
    """Asks all questions, `concurrency` at a time, spread over the endpoints.

    Raises:
        UserError: an endpoint cannot be reached, has no such model, or fails. What was
            answered until then is kept.
    """
    key = os.environ.get("OPENAI_API_KEY", "EMPTY")
    clients = [openai.AsyncOpenAI(base_url=url, api_key=key) for url in base_urls]
    started = time.monotonic()
    names = [await served_model(client, model) for client in clients]
    startup = time.monotonic() - started
    answers = Answers(result.with_suffix(".jsonl"))
    left = iter(answers.left(asked))

    async def ask(client: openai.AsyncOpenAI, name: str) -> None:
        for one in left:
            content = [part(p) for p in one.content]
            try:
                reply = await client.chat.completions.create(
                    model=name,
                    messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
                    temperature=0,
                    max_tokens=max_tokens,
                )
            except openai.OpenAIError as error:
                raise failure(client, error, f"question {one.number}") from None
            choice = reply.choices[0]
            tokens = reply.usage.completion_tokens if reply.usage else 0
            answers.add([(one, choice.message.content or "", choice.finish_reason, tokens)])

    tasks = [
        asyncio.create_task(ask(clients[i % len(clients)], names[i % len(clients)]))
        for i in range(max(concurrency, len(clients)))
    ]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    meta = {
        "software": f"{' and '.join(base_urls)} ({', '.join(dict.fromkeys(names))})",
        "dtype": None,
        "startup_seconds": startup,
    }
    result.write_text(json.dumps(meta))


async def served_model(client: openai.AsyncOpenAI, model: str | None) -> str:
    """The name under which the endpoint serves the model; its only one if none is asked for."""
    try:
        names = [served.id async for served in client.models.list()]
    except openai.OpenAIError as error:
        raise failure(client, error, "its list of models") from None
    if model is None and len(names) == 1:
        return names[0]
    if model is None or model not in names:
        raise UserError(
            f"--base-url {client.base_url}: it serves {', '.join(names) or 'nothing'}"
            + (f", not {model}" if model else "; say which with --model")
        )
    return model


def failure(client: openai.AsyncOpenAI, error: openai.OpenAIError, what: str) -> UserError:
    cause = f": {error.__cause__}" if error.__cause__ else ""
    advice = ""
    if isinstance(error, openai.APIConnectionError | openai.NotFoundError):
        advice = "Is it up, and does the address end in /v1? "
    elif "max_tokens" in str(error):
        advice = "Give a smaller --max-tokens. "
    return UserError(
        f"--base-url {client.base_url}: {what}: {error}{cause}\n{advice}"
        "Answers until now are kept: the same command goes on from them."
    )


def part(content: dict[str, Any]) -> dict[str, Any]:
    if content["type"] == "image":
        data = base64.b64encode(Path(content["path"]).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return content
