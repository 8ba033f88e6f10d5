"""A vLLM engine in a process of its own, that serves streams of requests, and samples.

python -m tests.serving.engine CONNECTION VLLM_OPTION…    (started by `Engine`)
"""

from __future__ import annotations

import multiprocessing
import sys
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_deepstack.check.compare import Run
from vllm_deepstack.check.engine import answer
from vllm_deepstack.check.processes import engine_job, make_engine, stopping
from vllm_deepstack.check.run import Result
from vllm_deepstack.check.stepping import (
    Joining,
    RefusedError,
    budget,
    chunks,
    flush,
    replaying,
    step_through,
)

from .streams import Request, Text

OPTIONS = ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1", "--seed", "0"]


class Engine:
    """Starts at once; the first use waits for it. To be stopped.

    Any process may use it that has forked off from the one that made it, one at a time.

    Raises, at any use:
        EngineError: the engine died; the message has its own errors.
    """

    def __init__(
        self, name: str, options: list[str], folder: Path, tree: Path | None = None, **env: str
    ):
        self.job = engine_job(name, tree, [*options, *OPTIONS], folder, [], __name__)
        self.job.env |= env
        self.connection, theirs = multiprocessing.Pipe()
        self.job.start(str(theirs.fileno()), pass_fds=(theirs.fileno(),))
        theirs.close()

    def budget(self) -> int:
        """The most tokens of a step: `max_num_batched_tokens`."""
        return self._ask(budget)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        number = uuid.uuid4()
        try:
            self.connection.send((number, question))
            while True:
                answered, given = self.connection.recv()
                if answered == number:  # and not what a test that was ended has asked
                    return given
        except (EOFError, ConnectionError):
            raise self.job.failure() from None

    def serve(
        self,
        stream: list[Request],
        threshold: int = 0,
        mode: str = "",
        by: str = "graph",
        keep: bool = False,
    ) -> list[Run]:
        """What each request got, served together as they join: a ValueError if it was refused.

        With a threshold, a step has no more tokens of one prompt, if there are other requests:
        `long_prefill_token_threshold`. With a mode, `forward` is replayed, as `replay.Graphs` has
        it; `record` comes first. The prefix cache is emptied before, unless `keep`.
        """
        how = {"stream": stream, "threshold": threshold, "mode": mode, "by": by, "keep": keep}
        return self._ask(partial(serve, **how))

    def record(self, v2: bool = True) -> dict[str, Any]:
        """`Replay.replay_record`, on a CPU."""
        return self._ask(partial(call, method="replay_record", arguments=(v2,)))

    def replayed(self) -> dict[str, Any]:
        """`Replay.replay_counts`."""
        return self._ask(partial(call, method="replay_counts", arguments=()))

    def sample(self, spec: Path, result: Path) -> Result:
        """What it gives for the samples of a check's job, from the file where it is kept."""
        if not result.exists():
            self._ask(partial(answer, spec=spec, result=result))
        return Result.load(result)

    def model(self, function: Callable[[Any], Any]) -> Any:
        """What a function (of a module, so that it can be pickled) gives for the model."""
        return self._ask(partial(apply, function=function))

    def llm(self, function: Callable[[Any], Any]) -> Any:
        """What a function (of a module, so that it can be pickled) gives for the `LLM`."""
        return self._ask(function)

    def sleep_and_wake(self) -> None:
        """`sleep(level=2)`, which discards the weights, and `wake_up()`."""
        self._ask(sleep_and_wake)

    def ended(self) -> bool:
        return self.job.process is None or self.job.process.poll() is not None

    def stop(self) -> None:
        self.connection.close()
        with stopping([self.job]):
            pass


def main(connection: Connection, options: list[str]) -> None:
    from vllm.platforms import current_platform

    # Not PyTorch's build, which may be CUDA's on any machine, and not `torch.cuda.is_available()`:
    # workers that fork off from this process could not use CUDA then.
    if current_platform.is_cpu():
        extension = "drawn.Drawn" if "dummy" in options else "unpinned.Unpinned"
        options = [*options, "--worker-extension-cls", f"tests.serving.{extension}"]
    llm = make_engine(options)
    while True:
        try:
            number, question = connection.recv()
        except EOFError:
            return
        connection.send((number, question(llm)))


def call(llm: Any, method: str, arguments: tuple[Any, ...]) -> Any:
    return llm.collective_rpc(method, args=arguments)[0]


def apply(llm: Any, function: Callable[[Any], Any]) -> Any:
    return llm.apply_model(function)[0]


def sleep_and_wake(llm: Any) -> None:
    llm.sleep(level=2)
    llm.wake_up()


def serve(
    llm: Any, stream: list[Request], threshold: int, mode: str, by: str, keep: bool
) -> list[Run | ValueError]:
    """Steps the engine by hand, so that who is in flight with whom is always the same."""
    # Each stream stands for itself: no cached prefixes, and in a broken engine, too, nothing that
    # an earlier stream left staged.
    if not keep:
        llm.reset_prefix_cache()
    flush(llm, lambda tokens: Text(tokens, seed=99).ids())
    if not keep:
        llm.reset_prefix_cache()
    with chunks(llm, threshold), replaying(llm, mode, by) if mode else nullcontext():
        return served(llm, stream)


def served(llm: Any, stream: list[Request]) -> list[Run | ValueError]:
    engine = llm.llm_engine
    tokenizer = llm.get_tokenizer()

    def prompt(request: Request) -> dict[str, Any]:
        made = request.prompt(tokenizer, engine.vllm_config.model_config.get_hidden_size())
        if "_prompt_embeds" not in made:
            return made
        if "multi_modal_data" in made:
            return engine.renderer._process_tokens(made)
        engine.renderer._apply_prompt_embeds_to_prompt(made, *made.pop("_prompt_embeds"))
        return made

    joining = [
        Joining(
            partial(prompt, r),
            r.max_tokens,
            r.joins_after,
            adapter=(r.adapter, r.adapter) if r.adapter else None,
        )
        for r in stream
    ]
    found = step_through(llm, joining)
    return [each if isinstance(each, RefusedError) else each.run for each in found]  # type: ignore[misc]


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), sys.argv[3:])
