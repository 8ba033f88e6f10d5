import torch.nn.functional as F

from vllm.model_executor.models.utils import _merge_multimodal_embeddings


def _add_deepstack_features(
    layer: torch.nn.Module, args: tuple, hidden_states: torch.Tensor
) -> torch.Tensor:
    """Forward hook of a decoder layer, whose output is [1, num_tokens, hidden_size]."""
    return hidden_states + layer.deepstack_features[: hidden_states.size(1)]


class MultiModalMixin:
    def __init__(self, *, vllm_config, prefix=""):
        ...
        self._init_deepstack(vllm_config)

    def _init_deepstack(self, vllm_config: "VllmConfig") -> None:
        """Give the first decoder layers buffers for features of vision encoder layers.

        Compiled and captured code reads and adds them at every step.
        """
        self.deepstack_layers: list[torch.nn.Module] = []
        self.deepstack_num_tokens = 0
        vision_config = getattr(self.config, "vision_config", None)
        num_levels = len(getattr(vision_config, "deepstack_visual_indexes", None) or ())
        if num_levels == 0 or not self.pp_group.is_first_rank:
            return
        if num_levels > self._pp_indices()[1]:
            raise ValueError(
                f"DeepStack needs the first {num_levels} layers on the first pipeline "
                "parallel rank."
            )
        max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        for layer in self.model.get_decoder().layers[:num_levels]:
            layer.register_buffer(
                "deepstack_features",
                torch.zeros(max_num_tokens, self.text_config.hidden_size),
                persistent=False,
            )
            layer.register_forward_hook(_add_deepstack_features)
            self.deepstack_layers.append(layer)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Not in forward(): replayed CUDA graphs do not run its Python code.
        for layer in self.deepstack_layers:
            layer.deepstack_features[: self.deepstack_num_tokens].zero_()
        self.deepstack_num_tokens = 0

        if multimodal_embeddings is None or is_multimodal is None:
            return super().embed_input_ids(input_ids)

        if self.deepstack_layers and len(multimodal_embeddings) > 0:
            self.deepstack_num_tokens = num_tokens = len(input_ids)
            hidden_size = self.text_config.hidden_size
            levels_size = hidden_size * len(self.deepstack_layers)
            # `prompt_embeds` items have no features.
            packed = [
                F.pad(item, (0, levels_size)) if item.size(-1) == hidden_size else item
                for item in multimodal_embeddings
            ]
            embeddings, *levels = torch.cat(packed).split(hidden_size, dim=-1)
            for layer, features in zip(self.deepstack_layers, levels):
                _merge_multimodal_embeddings(
                    layer.deepstack_features[:num_tokens], [features], is_multimodal
                )
            multimodal_embeddings = [embeddings]

        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def _get_features(self, modality, pixel_values, **kwargs):
        ...
        # remove
        return features.pooler_output
        embeddings = features.pooler_output
        if self.deepstack_layers:
            # One entry per item. `embed_input_ids` splits them again.
            levels = zip(embeddings, *features.deepstack_features)
            embeddings = [torch.cat(parts, dim=-1) for parts in levels]
        return embeddings
