"""`nn.Linear` for sampling on a CPU: a few rows are multiplied with all threads reading the weights.

With a few rows, the time of a product is that of reading the weights. MKL's own way to multiply few rows
reads them with one thread, at a third of the memory's bandwidth; a batch of products, each with a part of the
weights, has all threads at work: measured on two cores, 2 to 3.5 times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_ROWS = 4  # with eight rows there is no gain any more
PARTS = 8  # of the weight's rows; two do as well on two cores


class Linear(nn.Linear):
    """`nn.Linear` that on a CPU, without gradients, multiplies few rows (texts sampled together) in parts."""

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= MAX_ROWS * self.in_features and x.device.type == "cpu"
        if not few or torch.is_grad_enabled() or not torch.backends.mkl.is_available():
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # (R, in)
        whole = self.out_features - self.out_features % PARTS
        parts = self.weight[:whole].view(PARTS, whole // PARTS, self.in_features)  # (P, out / P, in)
        y = torch.bmm(parts, rows.t().expand(PARTS, -1, -1))  # (P, out / P, R)
        y = y.view(whole, len(rows)).t().contiguous()  # (R, out)
        if whole < self.out_features:  # 50257 words are an odd number
            y = torch.cat((y, F.linear(rows, self.weight[whole:])), dim=1)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)
