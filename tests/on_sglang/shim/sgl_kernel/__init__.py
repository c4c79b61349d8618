"""Tiny pure-torch stand-in for sgl_kernel's CPU symbols (test use only)."""

import ctypes
import sys
import types

import torch

__version__ = "0.0.0+cpushim"


def _missing(name):
    def f(*a, **k):
        raise NotImplementedError(f"sgl_kernel shim: {name} called")

    f.__name__ = name
    return f


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    n = tgt_loc.numel()
    if n == 0:
        return
    tgt = tgt_loc.tolist()
    src = src_loc.tolist()
    for p, s in zip(data_ptrs.tolist(), strides.tolist()):
        bufs = [ctypes.string_at(p + a * s, s) for a in src]
        for b, t in zip(bufs, tgt):
            ctypes.memmove(p + t * s, b, s)


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    off = 0
    for r, s, e in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()):
        req_to_token[r, s:e] = out_cache_loc[off : off + e - s].to(req_to_token.dtype)
        off += e - s


def assign_extend_cache_locs_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    off = 0
    for r, s, e in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()):
        out_cache_loc[off : off + e - s] = req_to_token[r, s:e].to(out_cache_loc.dtype)
        off += e - s


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    w = topk * num_steps
    for i, (r, s) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist())):
        out_cache_loc[i * w : (i + 1) * w] = req_to_token[r, s : s + w].to(out_cache_loc.dtype)


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    for i, n in enumerate(accept_lens.tolist()):
        bonus_tokens[i] = accept_tokens.view(-1)[i * accept_stride + max(n - 1, 0)]


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    sel = accept_index.view(-1)
    sel = sel[sel >= 0]
    accept_out_cache_loc[: sel.numel()] = out_cache_loc[sel.long()]


def reconstruct_indices_from_tree_mask(
    tree_mask,
    verified_seq_len,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    batch_size,
    draft_token_num,
):
    n = draft_token_num
    m = tree_mask.view(batch_size, n, n).bool()
    for b in range(batch_size):
        depth = m[b].sum(-1) - 1
        positions[b * n : (b + 1) * n] = depth + verified_seq_len[b]
        parent = [-1] * n
        for i in range(n):
            anc = [j for j in range(i) if m[b, i, j]]
            parent[i] = anc[-1] if anc else -1
        nt = [-1] * n
        ns = [-1] * n
        for i in range(n):
            kids = [j for j in range(n) if parent[j] == i]
            if kids:
                nt[i] = kids[0]
            for a, c in zip(kids, kids[1:]):
                ns[a] = c
        retrive_index[b] = torch.arange(b * n, (b + 1) * n)
        retrive_next_token[b] = torch.tensor(nt)
        retrive_next_sibling[b] = torch.tensor(ns)


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    bs, n = candidates.shape
    cand = candidates.tolist()
    ri = retrive_index.tolist()
    nt = retrive_next_token.tolist()
    ns = retrive_next_sibling.tolist()
    tp = target_predict.view(bs, n).tolist()
    for b in range(bs):
        last = 0
        cnt = 0
        accept_index[b, 0] = ri[b][0]
        cur = 0
        for _ in range(1, accept_index.shape[1]):
            cur = nt[b][last]
            ok = False
            while cur != -1:
                if cand[b][cur] == tp[b][last]:
                    predicts[ri[b][last]] = tp[b][last]
                    cnt += 1
                    accept_index[b, cnt] = ri[b][cur]
                    last = cur
                    ok = True
                    break
                cur = ns[b][cur]
            if not ok:
                break
        accept_token_num[b] = cnt
        predicts[ri[b][last]] = tp[b][last]


def _sub(name):
    m = types.ModuleType("sgl_kernel." + name)
    m.__getattr__ = lambda n: globals().get(n) or __getattr__(n)
    sys.modules["sgl_kernel." + name] = m
    return m


for _n in (
    "speculative",
    "kvcacheio",
    "mamba",
    "flash_attn",
    "elementwise",
    "sampling",
    "top_k",
    "moe",
    "gemm",
    "utils",
    "memory",
):
    _sub(_n)
