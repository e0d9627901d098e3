"""The server: `python -m fastllm.serve`. Extra `[serve]`.

    socket ──► connection.py ──► guard.py ──► routes/ ──► generation.py ──► AsyncLLM
              (caps, timeouts)   (host, key,    (OpenAI's   (streams, n,
                                 body, drain)   shapes)     disconnects)

    config.py      what can be set, checked when the server starts
    state.py       what all requests share: models in service, keys, limits, metrics, audit log
    models.py      models by name and version: load, swap, roll back, unload
    keys.py        who may do what

Nothing outside this package imports it, and importing `fastllm` does not.
"""
