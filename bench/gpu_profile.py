import sys
import torch
from fastllm.kernels import launch, tune
from fastllm.kernels.tiles import Tile
from fastllm.kernels.timing import seconds_per_call

LIST = [
    ("u4", 1, Tile(128, 8, 4, 3, 4, 0)),
    ("u4", 16, Tile(128, 16, 4, 3, 3, 0)),
    ("u4", 64, Tile(128, 64, 8, 3, 2, 0)),
    ("u4", 64, Tile(64, 64, 4, 3, 3, 0)),
    ("u4", 256, Tile(256, 128, 8, 3, 1, 1)),
    ("u4", 256, Tile(128, 128, 8, 3, 1, 0)),
    ("u4", 256, Tile(128, 128, 8, 4, 1, 1)),
]
if sys.argv[1] == "ncu":
    for kind, m, tile in LIST:
        x = torch.randn(m, 8192, device="cuda", dtype=torch.bfloat16)
        w = tune.random_matrix(kind, 8192, 8192, 128, "cuda")
        launch.weight_only(x, w, None, None, False, tile)
        torch.cuda.synchronize()
else:
    for kind, m, tile in LIST:
        row = []
        for k in (4096, 8192, 16384, 32768):
            ws = [tune.random_matrix(kind, 8192, k, 128, "cuda") for _ in range(max(2, (256 << 20) // (4096 * k)))]
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row.append(seconds_per_call([lambda w=w: launch.weight_only(x, w, None, None, False, tile) for w in ws], 16, 3) * 1e6)
        print(kind, m, tuple(tile), " ".join(f"{t:.1f}" for t in row), flush=True)
