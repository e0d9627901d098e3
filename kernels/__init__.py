"""Triton kernels of fastllm (extra `[gpu]`): one op per file."""
