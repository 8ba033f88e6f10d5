@pytest.mark.parametrize("with_end_tokens", [True, False])
@pytest.mark.parametrize(
    ("start", "media", "end", "mm_features", "media_positions"),
    [
        pytest.param(
            [VISION_START_TOKEN_ID],
            [IMAGE_TOKEN_ID] * 4,
            [VISION_END_TOKEN_ID],
            [make_image_feature(1, (1, 2, 2))],
            [[1, 1, 1, 1], [1, 1, 2, 2], [1, 2, 1, 2]],
            id="image",
        ),
        pytest.param(
            [VISION_START_TOKEN_ID],
            [IMAGE_TOKEN_ID] * 4,
            [VISION_END_TOKEN_ID],
            [make_image_feature(1, (1, 1, 2)), make_image_feature(3, (1, 2, 1))],
            [[1, 1, 3, 3], [1, 1, 3, 4], [1, 2, 3, 3]],
            id="adjacent-images",
        ),
        pytest.param(
            [VISION_START_TOKEN_ID],
            [VIDEO_TOKEN_ID] * 4,
            [VISION_END_TOKEN_ID],
            [make_video_feature(1, (2, 1, 2))],
            [[1, 1, 51, 51], [1, 1, 1, 1], [1, 2, 1, 2]],
            id="video",
        ),
        pytest.param(
            [AUDIO_START_TOKEN_ID],
            [AUDIO_TOKEN_ID] * 2,
            [AUDIO_END_TOKEN_ID],
            [make_audio_feature(1, audio_feature_length=16)],
            [[1, 2], [1, 2], [1, 2]],
            id="audio",
        ),
        pytest.param(
            [VISION_START_TOKEN_ID, AUDIO_START_TOKEN_ID],
            # The audio's end token is part of the placeholder.
            [VIDEO_TOKEN_ID] * 4 + [AUDIO_TOKEN_ID] * 2 + [AUDIO_END_TOKEN_ID],
            [VISION_END_TOKEN_ID],
            [make_video_feature(1, (1, 2, 2), True), make_audio_feature(1, 16)],
            [[2, 2, 2, 2, 2, 3, 4], [2, 2, 3, 3, 2, 3, 4], [2, 3, 2, 3, 2, 3, 4]],
            id="audio-in-video",
        ),
    ],
)
def test_mrope_positions_placeholder_at_prompt_end(
    start, media, end, mm_features, media_positions, with_end_tokens
):
    """End tokens are text: a prompt need not have them after its media."""
    end = end if with_end_tokens else []
    input_tokens = start + media + end
    model = make_model()

    positions, delta = model.get_mrope_input_positions(input_tokens, mm_features)

    media_positions = torch.tensor(media_positions)
    next_position = int(media_positions.max()) + 1
    expected = [
        torch.arange(len(start)).expand(3, -1),
        media_positions,
        (torch.arange(len(end)) + next_position).expand(3, -1),
    ]
    torch.testing.assert_close(positions, torch.cat(expected, dim=1))
    assert delta == next_position + len(end) - len(input_tokens)
