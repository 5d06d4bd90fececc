"""MaskTune: find where a classifier looks, hide it, and fine-tune for one epoch on what is left."""

from .masktune import masktune

__all__ = ["masktune"]
