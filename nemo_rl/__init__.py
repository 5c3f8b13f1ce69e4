"""Proven weight refits between Megatron-Core trainers and vLLM generators, and the GRPO loop around them."""
