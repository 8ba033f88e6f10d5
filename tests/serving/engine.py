"""A vLLM engine in a process of its own, that serves streams of requests.

python -m tests.serving.engine CONNECTION VLLM_OPTION…    (started by `Engine`)
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tools.parity import ParityError
from tools.parity.compare import Run
from tools.parity.engine import logits
from tools.parity.run import engine_job, stopping

from .streams import Request, Text

OPTIONS = ["--logprobs-mode", "raw_logits", "--max-logprobs", "-1", "--seed", "0"]


class Engine:
    """Starts at once; the first use waits for it. To be stopped.

    Raises, at any use:
        ParityError: the engine died; the message has its own errors.
    """

    def __init__(
        self, name: str, options: list[str], folder: Path, tree: Path | None = None, **env: str
    ):
        self.job = engine_job(name, tree, [*options, *OPTIONS], folder, [])
        self.job.module = __name__
        self.job.env |= env
        self.connection, theirs = multiprocessing.Pipe()
        self.job.start(str(theirs.fileno()), pass_fds=(theirs.fileno(),))
        theirs.close()
        self.started: int | None = None

    def budget(self) -> int:
        """The most tokens of a step: `max_num_batched_tokens`."""
        try:
            self.started = self.started or self.connection.recv()
            return self.started
        except (EOFError, ConnectionError):
            raise self._death() from None

    def _ask(self, question: Any) -> Any:
        self.budget()
        try:
            self.connection.send(question)
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None

    def _death(self) -> ParityError:
        assert self.job.process
        self.job.process.wait()
        return ParityError(f"{self.job.name} died:\n{self.job.error()}")

    def serve(self, stream: list[Request]) -> list[Run]:
        """What each request got, served together as they join: a ValueError if it was refused."""
        return self._ask(stream)

    def model(self, function: Callable[[Any], Any]) -> Any:
        """What a function (of a module, so that it can be pickled) gives for the model."""
        return self._ask(function)

    def sleep_and_wake(self) -> None:
        """`sleep(level=2)`, which discards the weights, and `wake_up()`."""
        self._ask("sleep")

    def stop(self) -> None:
        self.connection.close()
        with stopping([self.job]):
            pass


def main(connection: Connection, options: list[str]) -> None:
    import torch

    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not torch.cuda.is_available():
        options = [*options, "--worker-extension-cls", "tests.serving.unpinned.Unpinned"]
    arguments = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(options)
    llm = LLM(**vars(arguments))
    connection.send(llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        if question == "sleep":
            llm.sleep(level=2)
            llm.wake_up()
            connection.send(None)
        elif callable(question):
            connection.send(llm.apply_model(question)[0])
        else:
            connection.send(serve(llm, question))


def serve(llm: Any, stream: list[Request]) -> list[Run | ValueError]:
    """Steps the engine by hand, so that who is in flight with whom is always the same."""
    engine = llm.llm_engine
    config = engine.vllm_config
    # Each stream stands for itself: no cached prefixes, and a step with as much text as fits,
    # which in a broken engine, too, ends what an earlier stream left staged.
    budget = config.scheduler_config.max_num_batched_tokens
    longest = config.model_config.max_model_len - 1
    llm.reset_prefix_cache()
    step_through(llm, [Request((Text(min(budget, longest), seed=99),))])
    llm.reset_prefix_cache()
    return step_through(llm, stream)


def step_through(llm: Any, stream: list[Request]) -> list[Run | ValueError]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    tokenizer = llm.get_tokenizer()
    waiting = list(enumerate(stream))[::-1]
    done: dict[int, Run | ValueError] = {}
    since = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (
            since >= waiting[-1][1].joins_after or not engine.has_unfinished_requests()
        ):
            number, request = waiting.pop()
            sampling = SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                logprobs=-1,
                flat_logprobs=True,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = request.prompt(tokenizer, engine.vllm_config.model_config.get_hidden_size())
            try:
                if "_prompt_embeds" in prompt:
                    prompt = engine.renderer._process_tokens(prompt)
                engine.add_request(str(number), prompt, sampling)
            except ValueError as error:
                done[number] = error
            since = 0
        for output in engine.step():
            if output.finished:
                tokens = output.outputs[0]
                done[int(output.request_id)] = Run(
                    np.array(tokens.token_ids), logits(tokens.logprobs, vocabulary)
                )
        since += 1
    return [done[number] for number in range(len(stream))]


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), sys.argv[3:])
