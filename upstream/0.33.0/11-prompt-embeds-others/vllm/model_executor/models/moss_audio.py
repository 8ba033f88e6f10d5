class MossAudioModel:
    def _split_multimodal_embeddings(self, multimodal_embeddings, hidden_size):
        ...
        packed_hidden_size = hidden_size * (deepstack_count + 1)  # anchor
        # `prompt_embeds` items have no DeepStack features.
        embeddings = tuple(
            F.pad(embedding, (0, packed_hidden_size - hidden_size))
            if embedding.shape[-1] == hidden_size
            else embedding
            for embedding in embeddings
        )
        ...
