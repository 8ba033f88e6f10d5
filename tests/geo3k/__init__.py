from vllm_deepstack import ROOT

NANO = ROOT / "benchmarks" / "geo3k_nano"
