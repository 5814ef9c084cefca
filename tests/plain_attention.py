"""A kernel of megalora.ops.merged_attention that runs anywhere."""

import torch


class Plain:
    """A kernel in plain torch; heads are in a row, and those that share keys stand beside each other."""

    def scores(self, q, k, causal, scale):
        s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        return s.masked_fill(torch.ones(s.shape[1:]).triu(1).bool(), float("-inf")) if causal else s

    def forward(self, q, k, v, causal, scale):
        s = self.scores(q, k, causal, scale)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("hqk,khd->qhd", s.softmax(-1), v), s.logsumexp(-1)

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
        p = (self.scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
        mean = (dout * out).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("qhd,khd->hqk", dout, wide_v) - mean) * scale
        dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, dout)
        return torch.einsum("hqk,khd->qhd", ds, wide_k), *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
