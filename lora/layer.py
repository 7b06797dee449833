"""LoRA on one linear layer (Hu et al. 2021, arXiv:2106.09685, section 4.1).

The pretrained W (out, in) stays frozen. What is trained is a change of rank at most r,

    W' = W + s·B·A        A (r, in), B (out, r), r much smaller than in and out; s = α/r,

so a layer trains r·(in + out) numbers instead of in·out. B starts at zero: training starts exactly
from the base model.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAError(ValueError):
    """A user's mistake about LoRA or an adapter's files; the message is one line."""

    def __init__(self, message: str) -> None:
        # Names from a file or a path can contain line breaks.
        super().__init__(" ".join(message.split()))


def check_hyperparameters(r: int, alpha: float, dropout: float) -> None:
    """Raise LoRAError unless 1 <= r < 2^16, 0 < alpha < 2^63 and 0 <= dropout < 1."""
    if type(r) is not int or not 1 <= r < 2**16:
        raise LoRAError(f"LoRA's rank r is {r!r:.40}; expected a whole number from 1 to 65535")
    if type(alpha) not in (int, float) or not 0 < alpha < 2**63:
        raise LoRAError(f"LoRA's alpha is {alpha!r:.40}; expected a number above 0, below 2^63")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise LoRAError(f"LoRA's dropout is {dropout!r:.40}; expected a number from 0 to below 1")


class LoRALinear(nn.Module):
    """y = base(x) + s·B(A(dropout(x))), with x (..., in) and y (..., out) in the base's dtype.

    s is alpha/r, or alpha/√r with `use_rslora`: then the update does not shrink as r grows
    (Kalajdzievski 2023, arXiv:2312.03732). `base` is frozen in place, not copied. Raises LoRAError
    if r, alpha or dropout is out of range.
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
        # dtype: fp32 whatever the base's dtype. A training step is about as small as the spacing of
        # bf16 numbers near A's entries (1.2e-4 at 0.02). In bf16 a step would be rounded to that
        # spacing or to zero, and the small steps of a falling learning rate would be lost.
        fp32 = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **fp32))
        # Uniform in ±1/√in, as in the authors' code; the paper's text says Gaussian.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.dtype == torch.bfloat16:
            return self._bf16_training_forward(x)
        return self.definition(x)

    def definition(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out), by the formula of the class, in fp32."""
        y = self.base(x)  # (..., out)
        h = x.float()  # (..., in)
        if self.training and self.dropout:
            h = h * self.mask(h) / (1 - self.dropout)  # so that its expected value stays x
        h = F.linear(h, self.lora_A)  # (..., r)
        # s multiplies B, not the update: B has fewer numbers.
        update = F.linear(h, self.scaling * self.lora_B)  # (..., out)
        # dtype: the sum is formed in fp32, as the update is, and rounded to the base's dtype once.
        return (y + update).to(y.dtype)

    def mask(self, x: Tensor) -> Tensor:
        """What dropout (Srivastava et al. 2014) keeps of x, in its shape and dtype: 1, or 0 with
        probability p = `dropout`."""
        return torch.empty_like(x).bernoulli_(1 - self.dropout)

    def _bf16_training_forward(self, x: Tensor) -> Tensor:
        """The definition up to rounding; it saves the memory of fp32 copies of x and y.

        dtype: A and B stay fp32, and so does the optimizer's state. The products use A and B
        rounded to bf16, which changes the update by about 2^-8 of itself. The last product adds y
        in fp32 and rounds the sum once. Not for fp16: A's gradient is a product with B, which is
        close to zero at the start, and fp16 would round it to zero.
        """
        y = self.base(x)  # (..., out)
        scaling = self.scaling
        if self.dropout:
            # bf16 would round the factor 1/(1 - p): s takes it.
            x, scaling = x * self.mask(x), scaling / (1 - self.dropout)
        h = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        scaled_B = (scaling * self.lora_B).to(x.dtype)  # (out, r)
        out = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, self.r), scaled_B.T)
        return out.view(y.shape)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new frozen Linear with weight W + s·B·A (out, in) and the base's bias.

        The sum is formed in fp32 and rounded to the base's dtype once. The base stays as it is,
        because adding to a bf16 weight and subtracting again would not restore it.
        """
        linear = copy.deepcopy(self.base)
        # dtype: the sum with fp32 is fp32; copy_ rounds it.
        linear.weight.copy_(self.base.weight + self.scaling * (self.lora_B @ self.lora_A))
        return linear
