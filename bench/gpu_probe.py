"""First look at a GPU: limits, baselines, correctness of the kernels in bf16."""
import sys, time, torch, triton, triton.language as tl

from fastllm.kernels import launch, tune
from fastllm.kernels.layout import unpack_codes
from fastllm.kernels.timing import seconds_per_call
from fastllm.kernels.tiles import Tile

@triton.jit
def read(p, out, n, B: tl.constexpr, STEPS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * (B * STEPS) + tl.arange(0, B)
    acc = tl.zeros((B,), tl.int32)
    for i in tl.static_range(STEPS):
        acc ^= tl.load(p + at + i * B)
    v = tl.sum(acc, 0)
    if v == 123456789:
        tl.store(out, v)

def ref(w, x):
    codes = unpack_codes(w).float()
    g = w.scales.float().repeat_interleave(codes.shape[1] // w.scales.shape[0], 0).t()
    return x.double() @ ((codes - w.zero) * g)[:, : w.cols].double().t()

dev = "cuda"
print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
torch.manual_seed(0)
for kind, group in (("u4", 128), ("u4", 32), ("i8", 0), ("i8", 32)):
    for n, k in ((1024, 1024), (560, 576), (130, 2112)):
        w = tune.random_matrix(kind, n, k, group, dev)
        for m in (1, 5, 33, 200):
            for T in (torch.bfloat16, torch.float16):
                x = torch.randn(m, k, device=dev, dtype=T)
                r = ref(w, x)
                for tile in (Tile(128, 16, 4, 3, 2), Tile(64, 64, 4, 3, 1), Tile(256, 128, 8, 3, 1)):
                    y = launch.weight_only(x, w, None, None, False, tile)
                    e = float((y.double() - r).norm() / r.norm())
                    if not e < (6e-3 if T == torch.bfloat16 else 1e-3): print("BAD", kind, group, n, k, m, T, tile, e)
                y2 = launch.weight_only(x, w, None, None, False, tile)
                assert torch.equal(y, y2)
                if kind == "i8":
                    q, s = launch.quantize_rows(x)
                    am = x.float().abs().amax(1)
                    xq = torch.round(x.float() * (127 / am)[:, None]).double() * s.double()[:, None]
                    r = ref(w, xq)
                    for tile in (Tile(128, 16, 4, 3, 2), Tile(128, 128, 8, 3, 1)):
                        y = launch.int8(q, s, w, None, None, False, T, tile)
                        e = float((y.double() - r).norm() / r.norm())
                        if not e < (3e-3 if T == torch.bfloat16 else 4e-4): print("BAD int8", group, n, k, m, T, tile, e)
print("checked", flush=True)
n = k = 8192
buf = [torch.randint(-2**31, 2**31 - 1, (34_603_008 // 4,), dtype=torch.int32, device=dev) for _ in range(8)]
out = torch.zeros(1, dtype=torch.int32, device=dev)
best = None
for B, S, W in ((1024, 4, 4), (2048, 4, 8), (1024, 8, 4), (2048, 8, 8), (4096, 2, 8), (1024, 16, 4)):
    t = seconds_per_call([lambda b=b: read[(b.numel() // (B * S),)](b, out, b.numel(), B, S, num_warps=W) for b in buf])
    print(f"read {B}x{S} w{W}: {t*1e6:.2f} us {34.603008e6/t/1e12:.2f} TB/s")
big = torch.empty(1 << 30, dtype=torch.int32, device=dev); big2 = torch.empty_like(big)
t = seconds_per_call([lambda: big2.copy_(big)], 2, 3); print(f"copy {2*big.nbytes/t/1e12:.2f} TB/s")
del big, big2, buf
wb = [torch.randn(n, k, device=dev, dtype=torch.bfloat16) for _ in range(3)]
for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
    x = torch.randn(m, k, device=dev, dtype=torch.bfloat16)
    t = seconds_per_call([lambda w=w: torch.nn.functional.linear(x, w) for w in wb], 30 if m < 1024 else 6, 5)
    print(f"bf16 M {m}: {t*1e6:.1f} us {2*m*n*k/t/1e12:.0f} TFLOP/s")
