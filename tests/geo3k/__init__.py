from tools.releases import ROOT

NANO = ROOT / "benchmarks" / "geo3k_nano"
