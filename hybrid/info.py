"""Parameters by part, and what training keeps of a token, of a model that is built on the meta device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from hybrid.config import HybridConfig
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection import Injection
from trm_kernels.recursion.saved_bytes import saved_bytes

_SETTINGS = (
    "num_recursion_steps",
    "recursion_sampling",
    "num_cycles",
    "trm_num_layers",
    "trm_num_heads",
    "injection_strength",
    "blending_strategy",
)


@dataclass(frozen=True)
class Part:
    """A part of a model and how many parameters it has; tied tensors count once."""

    name: str
    parameters: int


def on_meta(
    config: HybridConfig,
    base_config: PreTrainedConfig,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> HybridModel:
    """The hybrid without any memory behind its parameters.

    dtype   of the base's; None: as its config says

    Errors: ValueError when the config does not fit the base.
    """
    config.check_base(base_config)
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config, trust_remote_code=trust_remote_code, **options)
        return HybridModel(llm_model=base, config=config)


def parts(model: HybridModel) -> Iterator[Part]:
    """The base, then what each injection point is made of (projections, recursion, gate), then LoRA."""
    yield Part("base", sum(p.numel() for _, p in model.base_named_parameters()))
    injections = sorted((m for m in model.modules() if isinstance(m, Injection)), key=lambda m: m.index)
    for injection in injections:
        point = model.config.injection_layers[injection.index]
        counts: dict[str, int] = {}
        for name, parameter in injection.named_parameters():
            part = "gate" if name.startswith("gate_") else name.partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        for part, parameters in counts.items():
            yield Part(f"layer {point}: {part}", parameters)
    if model.config.lora_rank is not None:
        own = sum(count(injection) for injection in injections)
        lora = sum(p.numel() for p in model.trm_parameters()) - own
        yield Part(f"LoRA of rank {model.config.lora_rank}", lora)


def settings(config: HybridConfig) -> Iterator[tuple[str, str]]:
    """(name, value) of what decides how a hybrid computes."""
    return ((name, str(getattr(config, name))) for name in _SETTINGS)


def count(module: torch.nn.Module) -> int:
    """Parameters of a module; tied tensors count once."""
    return sum(p.numel() for p in module.parameters())


def count_trained(model: PreTrainedModel) -> int:
    """Parameters that require gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def saved_by_injection(injection: Injection, h: torch.Tensor, save: str, num_recursion_steps: int) -> int:
    """Bytes that an injection into h [B, T, D] keeps for backward on the Triton kernels.

    Only shapes and dtypes are read. Not counted: parameters, and RoPE's table, which all points share.
    """
    B, T, D = h.shape
    trm = injection.recursion
    x = torch.empty(B, T, trm.hidden_size, dtype=h.dtype, device="meta")
    weights = [layer(trm.y_init.dtype) for layer in trm.layers]
    cycles = trm.num_cycles if trm.grad_cycles is None else trm.grad_cycles
    states = 2 if cycles == trm.num_cycles else 4  # x, the last y, and those with which gradients start
    of_projections = B * T * (D * h.element_size() + 4)  # h and its float32 rstd
    of_projections += B * T * 4 * injection.config.trm_input_norm  # x's
    of_recursion = cycles * (num_recursion_steps + 1) * saved_bytes(save, x, weights, trm.num_heads)
    return of_projections + states * x.nbytes + of_recursion


def saved_by_token(model: HybridModel, save: str) -> int:
    """Bytes that all injections keep of one token for backward, in bfloat16, on the Triton kernels."""
    width = model.config.get_text_config(decoder=True).hidden_size
    h = torch.empty(1, 1, width, dtype=torch.bfloat16, device="meta")
    n = model.config.num_recursion_steps
    return sum(saved_by_injection(m, h, save, n) for m in model.modules() if isinstance(m, Injection))
