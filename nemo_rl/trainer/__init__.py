"""The trainers: Megatron-Core models, the rules that turn their shards into Hugging Face boxes, and the Ray actor."""
