class Qwen3OmniMoeThinkerForConditionalGeneration:
    def get_mrope_input_positions(self, input_tokens, mm_features):
        ...
        for offset, modality, data in self.iter_mm_features(mm_features):
            ...
            if modality == "audio":
                ...
                # remove
                st_idx = int(audio_pos.max()) + 1
                # remove: a medium's end token is text
                eos_pos = np.broadcast_to(np.array([st_idx]), (3, 1))
                # remove
                llm_pos_ids_list.append(eos_pos)
                # remove
                st = offset + audio_tokens + 1
                st = offset + audio_tokens
            elif modality == "image":
                ...
                # remove
                st_idx = int(llm_pos_ids_list[-1].max()) + 1
                # remove
                eos_pos = np.broadcast_to(np.array([st_idx]), (3, 1))
                # remove
                llm_pos_ids_list.append(eos_pos)
                # remove
                st = offset + image_len + 1
                st = offset + image_len
            elif modality == "video":
                ...
                if not data["use_audio_in_video"]:
                    ...
                    # remove
                    st_idx = int(llm_pos_ids_list[-1].max()) + 1
                    # remove
                    eos_pos = np.broadcast_to(np.array([st_idx]), (3, 1))
                    # remove
                    llm_pos_ids_list.append(eos_pos)
                    # remove
                    st = offset + video_len + 1
                    st = offset + video_len
                else:
                    ...
                    # remove
                    st_idx = int(pos_ids.max()) + 1
                    # remove
                    eos_pos = np.broadcast_to(np.array([st_idx]), (3, 1))
                    # remove
                    llm_pos_ids_list.append(eos_pos)
                    # remove
                    llm_pos_ids_list.append(eos_pos + 1)
                    ...
                    # remove
                    st = offset + 1 + video_len + audio_len + 2
                    st = offset + 1 + video_len + audio_len
        ...
