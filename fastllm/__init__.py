"""fastllm: an inference core for large language models."""
