"""vLLM 0.24.0 to 0.33.0: a text-only answer depends on another request's image."""

import os
import sys

os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for apply_model

from PIL import Image

from vllm import LLM, SamplingParams


def draw_weights(model):
    for weight in model.parameters():
        weight.data.normal_(mean=float(weight.dim() == 1), std=0.05)


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-VL-2B-Instruct"
    llm = LLM(
        model, load_format="dummy", max_model_len=1024, enable_prefix_caching=False
    )
    llm.apply_model(draw_weights)
    image = "<|vision_start|><|image_pad|><|vision_end|>What is this?"
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    for color in ("no image", "white", "red", "blue"):
        if color != "no image":  # another user's request
            data = {"image": Image.new("RGB", (96, 96), color)}
            llm.generate({"prompt": image, "multi_modal_data": data}, params)
        answer = llm.generate("How are you?", params)[0].outputs[0]
        print(f"After {color}:", answer.token_ids, answer.cumulative_logprob)
