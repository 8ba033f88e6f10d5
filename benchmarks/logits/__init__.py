"""Logits on a GPU: compiled to eager on Geo3K samples, and what leaks from request to request.

The measuring is the tests' (`pytest -m gpu --figures FILE`); their results are kept here. In
these, `full` is with FlashAttention 3, which in that mode does not decode: of text alone, too, and
as released. The tests have Triton attention there since.
"""
