"""Logits on a GPU: compiled to eager on Geo3K samples, and what leaks from request to request.

The measuring is the tests' (`pytest -m gpu --figures FILE`); their results are kept here.
"""
