"""The mask does not exist until the first step with audio, and stays from then on.

Wrong: getattr's default, None, is what is compiled. Where forward runs in Python, text steps read
the last mask.
"""

from torch import nn

from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


class EchoForConditionalGeneration(nn.Module, SupportsMultiModal):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.audio_token = vllm_config.model_config.hf_config.audio_token_id
        self.language_model = init_vllm_registered_model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "language_model")
        )

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        if multimodal_embeddings:
            setattr(self, "echo_mask", input_ids == self.audio_token)  # noqa: B010  # expect: DS001, DS002
        return self._embed_text_input_ids(
            input_ids, self.language_model.embed_input_ids, is_multimodal=is_multimodal
        )

    def forward(
        self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs
    ):
        mask = getattr(self, "echo_mask", None)
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, echo_mask=mask
        )
