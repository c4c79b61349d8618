"""Lossless decoding: sampling from the target, verification of drafts, acceptance statistics."""
