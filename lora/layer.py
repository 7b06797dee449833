"""LoRA on one linear layer (Hu et al. 2021, arXiv:2106.09685, section 4.1).

The pretrained W (out, in) stays frozen; what is learned is a change of rank at most r,

    W' = W + s·B·A        A (r, in), B (out, r), r much smaller than in and out,

so a layer trains r·(in + out) numbers instead of in·out. B starts at zero, so that training starts
from the base model exactly.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAError(ValueError):
    """A user's mistake about LoRA or an adapter's files; the message is one line, to be printed."""

    def __init__(self, message: str) -> None:
        # What is quoted from a file or a path may hold line breaks.
        super().__init__(" ".join(message.split()))


def check_hyperparameters(r: int, alpha: float, dropout: float) -> None:
    """Raise LoRAError unless r >= 1, 0 < alpha < inf and 0 <= dropout < 1."""
    if type(r) is not int or r < 1:
        raise LoRAError(f"LoRA's rank r is {r!r}; expected a whole number of at least 1")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise LoRAError(f"LoRA's alpha is {alpha!r}; expected a finite number above 0")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise LoRAError(f"LoRA's dropout is {dropout!r}; expected a number from 0 to below 1")


class LoRALinear(nn.Module):
    """y = base(x) + s·B(A(dropout(x))), with x (..., in) and y (..., out) in the base's dtype.

    s is alpha/r, or under `use_rslora` alpha/√r, with which the update does not shrink as r grows
    (Kalajdzievski 2023, arXiv:2312.03732). `base` is frozen in place, not copied. Raises LoRAError
    for an r, alpha or dropout out of range.
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, use_rslora: bool = False
    ) -> None:
        super().__init__()
        check_hyperparameters(r, alpha, dropout)
        self.base = base.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        # dtype: fp32 whatever the base's. bf16 numbers around A's entries are about as far apart as
        # a step is long (1.2e-4 at 0.02): it would be rounded to a whole spacing or to nothing, and
        # the small steps of a falling rate would never add up.
        fp32 = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **fp32))
        # Uniform in ±1/√in, as in the authors' code; the paper's text says Gaussian.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., out)
        if self.training and x.dtype == torch.bfloat16:
            return self._add_rounded_update(x, y)
        h = F.dropout(x.float(), self.dropout, training=self.training)  # (..., in)
        h = F.linear(h, self.lora_A)  # (..., r)
        # s goes to B, which is small, and not to the update, which has a row for every token.
        update = F.linear(h, self.scaling * self.lora_B)  # (..., out)
        # dtype: y is promoted, so that the sum is formed in fp32 and rounded once.
        return (y + update).to(y.dtype)

    def _add_rounded_update(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s·B(A(dropout(x))) in training on a bf16 base, without copies of x and y in fp32.

        dtype: A and B stay fp32, and so do their moments; what is multiplied is their roundings to
        bf16, which changes the update by about one part in 2^8 of itself. The sum with y is formed
        in fp32 inside the product, and rounded once. Not for fp16: A's gradient passes through B,
        and with a B that has just left zero it would underflow.
        """
        scaling = self.scaling
        if self.dropout:
            # The same draw as F.dropout's, whose factor 1/(1 - p) bf16 would round: s takes it.
            kept = torch.empty_like(x).bernoulli_(1 - self.dropout)
            x, scaling = x * kept, scaling / (1 - self.dropout)
        h = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        scaled = (scaling * self.lora_B).to(x.dtype)  # (out, r)
        out = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, self.r), scaled.T)
        return out.view(y.shape)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new frozen Linear with weight W + s·B·A (out, in) and the base's bias.

        The sum is formed in fp32 and rounded to the base's dtype once. The base is left as it is:
        adding in place and subtracting again would not restore a bf16 weight.
        """
        linear = copy.deepcopy(self.base)
        # dtype: the base's weight is promoted by the sum with fp32; copy_ rounds.
        linear.weight.copy_(self.base.weight + self.scaling * (self.lora_B @ self.lora_A))
        return linear
