from tools import ROOT

NANO = ROOT / "benchmarks" / "geo3k_nano"
