"""Measurements of a running server over HTTP: `python -m fastllm.bench serve`, extra `[bench]`.

It speaks the OpenAI dialect, so any server that does can be measured. `docs/benchmarks/serving.md` says how.
What measures the library itself stands in the repository under `bench/` and is not installed.
"""
