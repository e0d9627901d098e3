"""Runs the client against the installed scheduler and block pool; prints what tests/test_package.py compares."""

from __future__ import annotations

import gc
import json

import client
import numpy as np

from fastllm import SamplingParams
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence

scheduler = Scheduler(
    num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=24, vocab_size=50
)
held = client.Reservation(scheduler.pool, 6)
sequence = Sequence("first", np.arange(5, dtype=np.int32), SamplingParams(max_tokens=3))
scheduler.add(sequence)
report = {
    "slots": held.slots(6),
    "pool": scheduler.pool.slot_mapping([0], 0, 1).tolist(),
    "free": scheduler.pool.num_free,
    "step": client.run_step(scheduler, sequence),
    "free while running": scheduler.pool.num_free,
}
scheduler.rollback()
scheduler.abort(sequence)
del held
gc.collect()
report["free at last"] = scheduler.pool.num_free
scheduler.check()
print(json.dumps(report))
