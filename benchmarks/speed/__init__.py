"""Speed: what serving costs with the fork, and how near its DeepStack path is to the hardware."""
