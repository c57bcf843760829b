"""Whole models from one format to the other: Hugging Face folder <-> Megatron checkpoint, and the round trip."""
