"""The engine that a `vllm serve` line starts, without the server in front of it.

vLLM's own parser reads the line, in the process that starts the engine: the vLLM there may be
another than the installed one. The names are the same from 0.20.0 to 0.33.0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch


@dataclass(frozen=True)
class Line:
    engine: dict[str, Any]
    """The fields of vLLM's `EngineArgs`."""
    chat: dict[str, Any]
    """What `LLM.chat` is given beside the messages: the template, and its arguments."""
    adapters: dict[str, str]
    """LoRA adapters' folders by name."""
    notes: list[str]
    """What is not checked of the line."""


def read(options: list[str]) -> Line:
    """
    Raises:
        ValueError: vLLM does not take the line, or it names no model.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:  # in place of the end of the process
        raise ValueError(f"vllm serve: {message}")

    serve = cmd_init()[0]
    parser = FlexibleArgumentParser()
    own = serve.subparser_init(parser.add_subparsers())
    parser.error = own.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args(["serve", *options])
    serve.validate(args)
    if getattr(args, "model_tag", None):
        args.model = args.model_tag
    elif args.model == EngineArgs.model:  # a default of vLLM's
        refuse("names no model")
    known = {field.name: field for field in fields(EngineArgs)}
    notes = []
    if getattr(args, "data_parallel_size", 1) > 1:
        notes.append(f"data parallel: one rank of {args.data_parallel_size} is checked")
        for name in known:
            if name.startswith("data_parallel"):
                setattr(args, name, own.get_default(name))
        args.data_parallel_size = 1
    used = {"model_tag", "chat_template", "chat_template_content_format", "lora_modules"}
    used |= {"default_chat_template_kwargs", "config", "subparser"}
    only = [
        f"--{name.replace('_', '-')}"
        for name, value in vars(args).items()
        if name not in known.keys() | used and value != own.get_default(name)
    ]
    if only:
        notes.append(f"what the server alone needs: {' '.join(sorted(only))}")
    try:
        from vllm.renderers.chat_utils import load_chat_template
    except ImportError:  # up to 0.32
        from vllm.entrypoints.chat_utils import load_chat_template
    chat = {
        "chat_template": load_chat_template(args.chat_template),
        "chat_template_content_format": args.chat_template_content_format,
        "chat_template_kwargs": getattr(args, "default_chat_template_kwargs", None),
    }
    adapters = {each.name: each.path for each in args.lora_modules or ()}
    chat = {name: value for name, value in chat.items() if value is not None}
    return Line(vars(EngineArgs.from_cli_args(args)), chat, adapters, notes)


def start(line: Line) -> Any:
    """An `LLM` with the defaults of the server, which differ with the GPU."""
    from vllm import LLM
    from vllm.usage.usage_lib import UsageContext

    server = SimpleNamespace(LLM_CLASS=UsageContext.OPENAI_API_SERVER)
    with patch("vllm.entrypoints.llm.UsageContext", server):
        return LLM(**line.engine)
