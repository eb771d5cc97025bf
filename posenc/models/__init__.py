"""Whole models around the attention: GPT-2, and its checkpoints."""
