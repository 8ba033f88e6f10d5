"""Geo3K-nano: diagrams drawn from a seed, in Geo3K's schema, and a small model for them."""
