"""Measurements beside Hugging Face, TransformerLens and nnsight: `python -m benchmarks.hook_overhead --help`."""
