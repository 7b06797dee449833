"""`lora.layer` and `lora.inject`: against PEFT, against the definition, and under training."""

import copy
import math
from collections.abc import Iterator

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from lora.inject import ATTENTION, MLP, inject_lora, lora_modules, lora_parameters, merge_lora
from lora.layer import LoRAError, LoRALinear

IDS = torch.tensor([[5, 9, 3, 17, 40, 2], [8, 8, 61, 30, 1, 25]])
R, ALPHA = 4, 6.0  # alpha != r, so that s is not 1; r > 1, so that alpha/r is not alpha/√r


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter again: zero biases and unit norms of new models hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def redraw_lora(model: nn.Module, seed: int = 1) -> None:
    """Draw A and B again: B starts at zero, so an untrained LoRA changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def carrier(classifier: bool = False) -> nn.Module:
    """A tiny Qwen2 of transformers, whose module tree is ours, in eval mode."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        num_labels=2,
    )
    kind = Qwen2ForSequenceClassification if classifier else Qwen2ForCausalLM
    return redraw(kind(config)).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return redraw(nn.Linear(32, 24, bias=bias)).to(dtype)


def layer(base: nn.Linear, dropout: float = 0.0, use_rslora: bool = False) -> LoRALinear:
    wrapped = LoRALinear(base, R, ALPHA, dropout, use_rslora)
    redraw_lora(wrapped)
    return wrapped


def frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    trained = {id(p) for p in lora_parameters(model).values()}
    return ((n, p) for n, p in model.named_parameters() if id(p) not in trained)


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


# The layer


@pytest.mark.parametrize("use_rslora", [False, True])
def test_layer_is_its_definition(use_rslora: bool) -> None:
    wrapped = layer(linear(), use_rslora=use_rslora)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    s = ALPHA / math.sqrt(R) if use_rslora else ALPHA / R
    w = wrapped.base.weight.double() + s * wrapped.lora_B.double() @ wrapped.lora_A.double()
    y = x.double() @ w.T + wrapped.base.bias.double()
    # fp32 sums of 32 products of size about 1 to 10: an error of a few 1e-6 at most.
    torch.testing.assert_close(wrapped(x).double(), y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_model_equals_peft(use_rslora: bool) -> None:
    ours, base = carrier(), carrier()
    inject_lora(ours, ATTENTION + MLP, R, ALPHA, 0.0, use_rslora)
    redraw_lora(ours)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=[*ATTENTION, *MLP], use_rslora=use_rslora
    )
    theirs = peft.get_peft_model(base, config).eval()
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for name, parameter in lora_parameters(ours).items():
            modules[f"base_model.model.{name}.default"].weight.copy_(parameter)
    # The same fp32 operations, perhaps in another order, on logits of size about 1 to 10.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    # The other scaling, or none of the update, must be far outside that tolerance.
    for module in lora_modules(ours).values():
        module.scaling = ALPHA / R if use_rslora else ALPHA / math.sqrt(R)
    assert (logits(ours) - logits(theirs)).abs().max() > 0.1
    assert (logits(carrier()) - logits(theirs)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_equals_peft_in_train_mode(dtype: torch.dtype) -> None:
    """Dropout is applied to the input of A only; a bf16 base rounds."""
    ours = layer(linear(dtype), dropout=0.5).train()
    root = nn.Sequential()
    root.add_module("q_proj", linear(dtype))
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["q_proj"], lora_dropout=0.5)
    theirs = peft.get_peft_model(root, config).base_model.model.q_proj.train()
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    torch.manual_seed(3)
    y = ours(x)
    torch.manual_seed(3)  # the same mask
    expected = theirs(x)
    assert y.dtype == expected.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    else:
        # A, h and s·B are each rounded by up to 2^-8 of themselves, and either sum once.
        bound = 2**-8 * (3 * update_size(ours, x) + y.float().abs() + expected.float().abs())
        assert ((y.float() - expected.float()).abs() <= bound).all()


@pytest.mark.parametrize("training", [False, True])
def test_bf16_output_is_rounded_once(training: bool) -> None:
    """In training the factors are rounded; the sum with y is still formed in fp32."""
    wrapped = layer(linear(torch.bfloat16))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)

    def rounded(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16).float() if training else t

    h = rounded(x.float() @ rounded(wrapped.lora_A).T)
    update = h @ rounded(wrapped.scaling * wrapped.lora_B).T
    once = (wrapped.base(x).float() + update).to(torch.bfloat16)
    twice = wrapped.base(x) + update.to(torch.bfloat16)
    y = wrapped.train(training)(x)
    # 99 %: the order of fp32 sums may move a value that lies on a rounding border, and no other.
    assert (y == once).float().mean() > 0.99
    assert (y == twice).float().mean() < 0.9


def update_size(layer: LoRALinear, x: Tensor) -> Tensor:
    """The update with the absolute value of every product: the scale of its errors."""
    size = x.detach().float().abs() @ layer.lora_A.abs().T @ layer.lora_B.abs().T
    return (layer.scaling / (1 - layer.dropout) * size).detach()


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
def test_bf16_training_form_is_the_definition_by_bound(dropout: float) -> None:
    """Value and gradients, with dropout's mask the same."""
    wrapped = layer(linear(torch.bfloat16), dropout=dropout).train()
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    x.requires_grad_()
    dy = torch.randn(4096, 24, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    inputs = (x, wrapped.lora_A, wrapped.lora_B)
    torch.manual_seed(3)
    y = wrapped(x)
    found = torch.autograd.grad(y, inputs, dy)

    torch.manual_seed(3)
    exact = x.detach().float().requires_grad_()
    update = wrapped.scaling * F.dropout(exact, dropout) @ wrapped.lora_A.T @ wrapped.lora_B.T
    whole = F.linear(exact, wrapped.base.weight.float(), wrapped.base.bias.float()) + update
    expected = torch.autograd.grad(whole, (exact, *inputs[1:]), dy.float())
    # A, h and s·B are each rounded by up to 2^-8 of themselves, and so are base(x) and the sum.
    base = wrapped.base(x).detach().float().abs()
    bound = 2**-8 * (3 * update_size(wrapped, x) + base + whole.abs())
    error = y.float() - whole
    assert (error.abs() <= bound).all()
    assert error.abs().max() > 0  # or this compared one form with itself
    # No error that all outputs share, such as a factor 1/(1 - p) that was rounded (0.2 % for 0.05).
    share = (error * update).sum() / (update * update).sum()
    assert share.abs() < 1e-3
    for a, b, of in zip(found, expected, inputs, strict=True):
        assert a.dtype == of.dtype
        # Sums of tens of products, each of several roundings of 2^-8, whose signs differ.
        assert (a.float() - b).abs().max() < 4 * 2**-8 * b.abs().max()


def test_fp16_and_scoring_keep_the_definition() -> None:
    for dtype, training in ((torch.float16, True), (torch.bfloat16, False)):
        wrapped = layer(linear(dtype)).train(training)
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
        update = F.linear(F.linear(x.float(), wrapped.lora_A), wrapped.scaling * wrapped.lora_B)
        assert torch.equal(wrapped(x), (wrapped.base(x) + update).to(dtype))


def test_initial_update_is_zero_and_a_is_uniform() -> None:
    torch.manual_seed(0)
    base = linear()
    wrapped = LoRALinear(base, 16, ALPHA, dropout=0.5)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trainable == ["lora_A", "lora_B"] and wrapped.base is base
    x = torch.randn(4, 32)
    assert torch.equal(wrapped(x), base(x))  # train mode: dropout never touches the base's path
    bound = 1 / math.sqrt(32)
    size = wrapped.lora_A.abs()
    # The largest of 512 uniform draws is below 0.98 of the bound once in e^10 seeds.
    assert 0.98 * bound < size.max() <= bound
    assert abs(size.mean() - bound / 2) < 0.05 * bound  # 4 standard errors: 4·0.29/√512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (2, 1, 3, 32), (0, 32)])
def test_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wrapped = layer(linear(dtype))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = wrapped(x)
    assert y.shape == (*shape[:-1], 24) and y.dtype == dtype
    assert wrapped.lora_A.dtype == wrapped.lora_B.dtype == torch.float32
    rows = torch.stack([wrapped(row) for row in x.reshape(-1, 32)]) if x.numel() else y
    # fp32: another blocking of the same sums. bf16: see above, and twice for the base's own.
    tolerance = (
        {"rtol": 0, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(y.reshape(-1, 24), rows.reshape(-1, 24), **tolerance)


def test_parameters_stand_on_the_device_of_the_base() -> None:
    wrapped = LoRALinear(nn.Linear(32, 24, device="meta"), R, ALPHA)
    assert {p.device.type for p in wrapped.parameters()} == {"meta"}
    assert wrapped.merged().weight.device.type == "meta"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("r", v) for v in (0, -1, 2.0, True, None, "8")),
        *(("alpha", v) for v in (0, -1.0, math.inf, math.nan, None, "16", True)),
        *(("dropout", v) for v in (-0.1, 1, 1.0, math.nan, None, "0.1")),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    settings = {"r": R, "alpha": ALPHA, "dropout": 0.0, name: value}
    base = linear()
    with pytest.raises(LoRAError, match=f"{name} is {value!r}") as error:
        LoRALinear(base, **settings)
    assert "\n" not in str(error.value)
    assert base.weight.requires_grad


# Merging


def test_merged_model_equals_unmerged() -> None:
    model = carrier()
    names = inject_lora(model, ATTENTION + MLP, R, ALPHA, 0.1)
    redraw_lora(model)
    before = logits(model)
    assert merge_lora(model) == len(names) == 14
    # W·x + s·B·A·x against (W + s·B·A)·x: fp32 rounding through two layers, logits of size 1 to 10.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    assert (logits(carrier()) - before).abs().max() > 0.1
    assert type(model.get_submodule(names[0])) is nn.Linear
    assert [n for n, _ in model.named_modules()] == [n for n, _ in carrier().named_modules()]
    merged = copy.deepcopy(model.state_dict())
    assert merge_lora(model) == 0
    assert all(torch.equal(t, merged[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_three_times_changes_nothing(dtype: torch.dtype, bias: bool) -> None:
    wrapped = layer(linear(dtype, bias))
    state = torch.get_rng_state()
    before = {name: to_bytes(p) for name, p in wrapped.named_parameters()}
    first, second, third = (wrapped.merged() for _ in range(3))
    assert {name: to_bytes(p) for name, p in wrapped.named_parameters()} == before
    assert torch.equal(first.weight, second.weight) and torch.equal(first.weight, third.weight)
    assert first.weight.data_ptr() != wrapped.base.weight.data_ptr()
    assert not torch.equal(first.weight, wrapped.base.weight)
    assert torch.equal(torch.get_rng_state(), state)  # a merge must not shift later draws
    if bias:
        assert torch.equal(first.bias, wrapped.base.bias)
        assert first.bias.data_ptr() != wrapped.base.bias.data_ptr()
    else:
        assert first.bias is None


def test_bf16_merge_is_rounded_once() -> None:
    wrapped = layer(linear(torch.bfloat16))
    delta = wrapped.scaling * wrapped.lora_B.double() @ wrapped.lora_A.double()
    exact = wrapped.base.weight.double() + delta
    weight = wrapped.merged().weight
    assert weight.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits, and fp32's error (1e-6) on top.
    assert ((weight.double() - exact).abs() <= 2**-9 * 2 * exact.abs() + 1e-6).all()
    twice = wrapped.base.weight + delta.to(torch.bfloat16)
    assert (weight.double() - exact).abs().mean() < 0.9 * (twice.double() - exact).abs().mean()


# Injection


class Traps(nn.Module):
    """Names that contain a target, or that a target contains."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.my_q_proj = nn.Linear(4, 4)
        self.q_proj_2 = nn.Linear(4, 4)
        self.score = nn.Linear(4, 2)
        self.lora_head = nn.Linear(4, 2)
        self.block = nn.ModuleDict(
            {
                "q_proj": nn.Linear(4, 4),
                "v_proj": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
                "k_proj": nn.Embedding(4, 4),
            }
        )


def test_names_match_whole_components() -> None:
    model = Traps()
    assert inject_lora(model, ["q_proj"], R, ALPHA, 0.0) == ["q_proj", "block.q_proj"]
    assert list(lora_modules(model)) == ["q_proj", "block.q_proj"]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = ["q_proj.lora_A", "q_proj.lora_B", "block.q_proj.lora_A", "block.q_proj.lora_B"]
    assert trainable == list(lora_parameters(model)) == expected


def test_a_dotted_target_names_one_module() -> None:
    assert inject_lora(Traps(), ["block.q_proj"], R, ALPHA, 0.0) == ["block.q_proj"]


@pytest.mark.parametrize("target", ["v_proj", "k_proj", "proj", "q_pro", "", "Q_PROJ"])
def test_a_target_without_a_linear_is_refused(target: str) -> None:
    model = Traps()
    with pytest.raises(LoRAError) as error:
        inject_lora(model, ["q_proj", target], R, ALPHA, 0.0)
    message = str(error.value)
    assert f"{target!r}" in message and "\n" not in message
    assert "q_proj, my_q_proj, q_proj_2, score, lora_head, dense" in message
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())


def test_no_target_is_refused() -> None:
    with pytest.raises(LoRAError, match="no LoRA targets"):
        inject_lora(Traps(), [], R, ALPHA, 0.0)


@pytest.mark.parametrize("again", ["q_proj", "score", "base"])
def test_a_second_injection_is_refused(again: str) -> None:
    model = Traps()
    inject_lora(model, ["q_proj"], R, ALPHA, 0.0)
    with pytest.raises(LoRAError, match="already has LoRA on 2 modules") as error:
        inject_lora(model, [again], R, ALPHA, 0.0)
    assert "\n" not in str(error.value)
    assert all(p.requires_grad for p in lora_parameters(model).values())


def test_bad_settings_leave_the_model_as_it_was() -> None:
    model = Traps()
    with pytest.raises(LoRAError):
        inject_lora(model, ["q_proj"], 0, ALPHA, 0.0)
    assert not lora_modules(model) and all(p.requires_grad for p in model.parameters())


def test_names_are_stable_and_complete() -> None:
    model = carrier()
    names = inject_lora(model, ATTENTION, R, ALPHA, 0.0)
    layers = [f"model.layers.{i}.self_attn.{t}" for i in range(2) for t in ATTENTION]
    assert sorted(names) == sorted(layers)
    shapes = {name: tuple(p.shape) for name, p in lora_parameters(model).items()}
    assert len(shapes) == 16
    assert shapes["model.layers.1.self_attn.k_proj.lora_A"] == (R, 16)
    assert shapes["model.layers.1.self_attn.k_proj.lora_B"] == (8, R)
    named = dict(model.named_parameters())
    assert all(named[name] is p for name, p in lora_parameters(model).items())
    assert lora_modules(carrier()) == {} and lora_parameters(carrier()) == {}


# Training


def test_dropout_is_on_in_training_alone() -> None:
    model = carrier()
    inject_lora(model, ATTENTION, R, ALPHA, 0.5)  # the model is in eval mode, and stays in it
    redraw_lora(model)
    plain = carrier()
    inject_lora(plain, ATTENTION, R, ALPHA, 0.0)
    redraw_lora(plain)
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(plain))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(plain))
    trained = carrier().train()
    inject_lora(trained, ATTENTION, R, ALPHA, 0.5)
    assert all(module.training for module in trained.modules())


def test_only_lora_moves_on_a_bf16_base() -> None:
    """Three real steps at a common learning rate: A and B move, nothing else does."""
    model = carrier().to(torch.bfloat16).train()
    inject_lora(model, ATTENTION + MLP, R, ALPHA, 0.0)
    parameters = lora_parameters(model)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    hashes = {name: to_bytes(p) for name, p in frozen(model)}
    assert "model.embed_tokens.weight" in hashes  # tied: it is the output layer too
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, weight_decay=0.0)
    for _ in range(3):
        scores = model(input_ids=IDS).logits[:, :-1].float()
        F.cross_entropy(scores.flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        assert all(p.grad is None for _, p in frozen(model))
        optimizer.zero_grad()
    for name, parameter in parameters.items():
        # At ±1/√16 the spacing of bf16 is 1e-3: of A kept in bf16, three steps of 1e-4 would move
        # only the few entries near zero. AdamW moves every entry that has a gradient.
        moved = (parameter != start[name]).float().mean()
        assert parameter.dtype == torch.float32 and moved > 0.95, name
    assert {name: to_bytes(p) for name, p in frozen(model)} == hashes
