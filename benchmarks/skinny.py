"""One process: right? then us per layer of chains of qkv, o, gate-up, down for every setting of the knobs."""
import itertools, json, os, sys, torch
from llama3.ops import elementwise, linear, skinny, gemm_search
from llama3.shapes import shape_config
BW, PEAK = 4.585e12, 787e12
dev, bf = 'cuda', torch.bfloat16
out = {}
def timed(fn, n, reps=5):
    for i in range(min(n, 2)): fn(i)
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for i in range(n): fn(i)
    g.replay(); torch.cuda.synchronize()
    ts = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b) * 1e3 / n)
    return sorted(ts)[len(ts) // 2]
def check():
    torch.manual_seed(0); bad = 0
    for (H, N) in ((256, 512), (2048, 3072), (4096, 6144), (2048, 16384)):
        for T in (1, 9, 16, 33, 64):
            x = (torch.randn(T, H, device=dev) * 3).to(bf); nw = torch.randn(H, device=dev).to(bf)
            w = (torch.randn(N, H, device=dev) * H**-.5).to(bf); r = torch.randn(T, N, device=dev).to(bf)
            torch.cuda.synchronize()
            xd = x.double(); y = (xd * torch.rsqrt(xd.square().mean(-1, keepdim=True) + 1e-5) * nw.double()) @ w.double().t()
            g, u = y.view(T, -1, 2, 8).unbind(2); s = (g * torch.sigmoid(g) * u).flatten(1); a = xd @ w.double().t() + r.double()
            for wish in ((0, 0, 0), (0, 1, 1), (0, 4, 1), (0, 1, 2), (0, 2, 2)):
                n = 8
                while n < T: n *= 2
                if n // max(wish[2], 1) < 8: continue
                for nm, o, t in (('norm', skinny.norm_linear(x, nw, w, 1e-5, wish), y), ('swi', skinny.norm_swiglu(x, nw, w, 1e-5, wish), s), ('add', skinny.linear_add(x, w, r, wish), a)):
                    e = ((o.double() - t).norm() / t.norm()).item()
                    if not e < 4e-3: bad += 1; print('BAD', nm, (T, H, N), wish, e, flush=True)
    return bad
def chains():
    for name, Ts in (('1b', (16, 32, 64)), ('8b', (32, 64))):
        c = shape_config(name); H, F = c.hidden_size, c.intermediate_size
        L = 16 if name == '1b' else 6
        W = [[(torch.randn(N, K, device=dev) * K**-.5).to(bf) for N, K in ((c.qkv_size, H), (H, c.q_size), (2 * F, H), (H, F))] for _ in range(L)]
        nw = torch.ones(H, device=dev, dtype=bf)
        for T in Ts:
            gemm_search.expect_decode(T)
            x = torch.randn(T, H, device=dev).to(bf); A = torch.randn(T, c.q_size, device=dev).to(bf)
            def cublas(i):
                w = W[i % L]; linear.product(elementwise.rms_norm(x, nw, 1e-5), w[0]); y = linear.product(A, w[1], x)
                return linear.product(elementwise.silu_mul(linear.product(elementwise.rms_norm(y, nw, 1e-5), w[2])), w[3], y)
            def sk(i, wishes):
                w = W[i % L]; skinny.norm_linear(x, nw, w[0], 1e-5, wishes[0]); y = skinny.linear_add(A, w[1], x, wishes[1])
                return skinny.linear_add(skinny.norm_swiglu(y, nw, w[2], 1e-5, wishes[2]), w[3], y, wishes[3])
            def mix(i, wishes):  # one kernel only where it replaces three launches
                w = W[i % L]; linear.product(elementwise.rms_norm(x, nw, 1e-5), w[0]); y = linear.product(A, w[1], x)
                return linear.product(skinny.norm_swiglu(y, nw, w[2], 1e-5, wishes[2]), w[3], y)
            for _ in range(2): cublas(0)
            fl = sum(w.numel() * 2 for w in W[0]) / BW * 1e6
            base = timed(cublas, 2 * L); rows = []
            for eager, trig, share in itertools.product((0, 1), (0, 8, 1 << 20), (0, 1, 2)):
                os.environ['LINEAR_EAGER'], os.environ['LINEAR_TRIGGER'] = str(eager), str(trig)
                wishes = [(0, 0, share)] * 4 if share < 2 else [(0, 0, 1), (0, 0, 1), (0, 1, 2), (0, 0, 1)]
                label = f'eager={eager} trigger={"start" if trig > 99 else trig} sharers={("auto", "none", "gate-up")[share]}'
                rows.append((timed(lambda i: sk(i, wishes), 2 * L), 'all  ' + label))
                rows.append((timed(lambda i: mix(i, wishes), 2 * L), 'gu   ' + label))
            rows.sort(); out[f'{name}.{T}'] = dict(floor=fl, cublas=base, skinny=rows)
            print(f'{name} T={T} floor {fl:.1f} cublas {base:.1f} | best: ' + ' | '.join(f'{t:.1f} {l}' for t, l in rows[:4]) + f' | worst {rows[-1][0]:.1f} {rows[-1][1]}', flush=True)
        del W
print('clusters', skinny.library().clusters(), 'bad', check(), flush=True)
chains()
json.dump(out, open(os.environ.get('OUT', '.') + '/eval_skinny.json', 'w'), indent=1)
