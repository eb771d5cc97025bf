"""AdamW over a model: which weights decay, and the optimiser's state."""

import torch
from torch import Tensor, nn

from posenc.encodings.learned import Learned
from posenc.wrappers import plain_name

#: The matrices and tables that GPT-2's recipe decays. Norms, biases, convolution kernels, tables of
#: relative distances and an encoding's own parameters do not decay.
DECAYED = (nn.Linear, nn.Embedding, Learned)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that decay, and those that do not.

    Decayed are matrices of `DECAYED` modules, less what a module's `no_weight_decay` names: own
    parameters, or a submodule's as "W_R.weight".
    """
    decayed: set[str] = set()
    exempt: set[str] = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        exempt.update(start + name for name in getattr(module, "no_weight_decay", ()))
        if isinstance(module, DECAYED):
            own = module.named_parameters(recurse=False)
            decayed.update(start + name for name, weight in own if weight.ndim >= 2)
    decayed -= exempt
    named = list(model.named_parameters())
    return (
        [weight for name, weight in named if name in decayed],
        [weight for name, weight in named if name not in decayed],
    )


def make_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices alone."""
    decayed, other = split_parameters(model)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": other, "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=lr, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step use this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by the parameters' bare names, made where the first step has yet to make it.

    The tensors are the optimiser's own: loading into them is loading the optimiser.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"{key}.{plain_name(name)}": value for key, value in state.items()}
    return tensors
