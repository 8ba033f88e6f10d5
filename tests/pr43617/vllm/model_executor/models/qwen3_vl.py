# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL, as vllm-project/vllm#43617 changes it."""

from .deepstack import PullRequest43617


class Qwen3VLForConditionalGeneration(PullRequest43617): ...
