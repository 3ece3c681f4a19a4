"""What learns a task: a recursion, or something else of its size. See docs/evidence-real.md."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from evidence.untied import UntiedStack
from peft import LoraConfig, get_peft_model

from evidence_real.beginnings import SharedBeginnings
from hybrid.demo.real.adapters import with_lora, with_recursion
from hybrid.demo.real.training import Model, TrainingPlan

LAST = 30  # layers of the base


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    learns   "recursion" (after the last layer), the same "of two layers", "untied" (n + 1 layers in its
             place), "LoRA on the last layer", "LoRA on all layers", the same "in bfloat16" (while it is
             trained, not while it is measured), or "nothing": the base as it is
    n        recursion steps; sampling: HybridConfig's recursion_sampling
    norm     HybridConfig's trm_input_norm
    rank     LoRA's
    fillers  whether tokens that say nothing follow each move
    plan     how it is trained
    """

    learns: str
    n: int = 8
    sampling: str = "fixed"
    norm: bool = True
    rank: int = 12
    fillers: bool = False
    plan: TrainingPlan = TrainingPlan()


def planned(one: Any, **changes: Any) -> Any:
    """An arm, or whatever else has a plan, with another one."""
    return replace(one, plan=replace(one.plan, **changes))


_RANDOM = Arm("recursion", sampling="uniform")
_ONE_STEP = Arm("recursion", n=1)
_LORA_ARM = Arm("LoRA on the last layer", plan=TrainingPlan(learning_rate=1e-3))
_LORA_ALL = Arm("LoRA on all layers", rank=2, plan=TrainingPlan(learning_rate=1e-3))
_LORA_BF16 = replace(_LORA_ALL, learns="LoRA on all layers, in bfloat16")
_SLOW_RISE = replace(_RANDOM, n=12, plan=TrainingPlan(steps=1500, warmup_steps=300, kept=4))
_SECONDS = 300.0  # of CPU time, about what the recursion takes

ARMS: dict[str, Arm] = {
    "frozen base": Arm("nothing", plan=TrainingPlan(steps=0)),
    "n random in 1..8": _RANDOM,
    "n random, text kept": replace(_RANDOM, plan=TrainingPlan(kept=4)),
    "n random in 1..12": replace(_RANDOM, n=12),
    "n random in 1..12, text kept": replace(_RANDOM, n=12, plan=TrainingPlan(kept=4)),
    "n random in 1..12, 1,500 steps": replace(_RANDOM, n=12, plan=TrainingPlan(steps=1500)),
    "n random in 1..12, text kept, 1,500 steps, warm-up of 300": _SLOW_RISE,
    "two layers, text kept, 1,500 steps, warm-up of 300": replace(
        _SLOW_RISE, learns="recursion of two layers"
    ),
    "n random, no norm": replace(_RANDOM, norm=False),
    "n = 1": _ONE_STEP,
    "n = 1, text kept": planned(_ONE_STEP, kept=4),
    "n = 1, 8,000 steps": planned(_ONE_STEP, steps=8000),
    "n = 8": Arm("recursion"),
    "untied, same FLOPs": Arm("untied"),
    "n = 1, fillers": replace(_ONE_STEP, fillers=True),
    "LoRA on the last layer": _LORA_ARM,
    "LoRA on the last layer, text kept": planned(_LORA_ARM, kept=4),
    "LoRA on the last layer, rate 3e-4": planned(_LORA_ARM, learning_rate=3e-4),
    "LoRA on the last layer, rate 3e-3": planned(_LORA_ARM, learning_rate=3e-3),
    "LoRA on the last layer, warm-up of 300": planned(_LORA_ARM, warmup_steps=300),
    "LoRA on all layers, same CPU time": planned(_LORA_ALL, seconds=_SECONDS, steps=80),
    "LoRA on all layers, 400 steps": planned(_LORA_ALL, steps=400),
    "LoRA on all layers, 1,500 steps": planned(_LORA_BF16, steps=1500),
    "LoRA on all layers, 3,000 steps": _LORA_BF16,
}


def model_of(arm: Arm, base: Any, seed: int) -> Model:
    """What the arm trains, inside `base`, which is changed."""
    torch.manual_seed(seed)
    if arm.learns == "nothing":
        return Model(base, base, LAST)
    if arm.learns == "LoRA on the last layer":
        return with_lora(base, arm.rank)
    if arm.learns.startswith("LoRA on all layers"):  # two matrices of each
        everywhere = LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules=["q_proj", "v_proj"])
        whole = get_peft_model(base, everywhere)
        if arm.learns.endswith("bfloat16"):
            return SharedBeginnings(whole, base, trained_in=torch.bfloat16)
        return Model(whole, base, layer=0)
    made = with_recursion(
        base,
        seed,
        num_recursion_steps=arm.n,
        recursion_sampling=arm.sampling,
        trm_input_norm=arm.norm,
        trm_num_layers=2 if arm.learns.endswith("two layers") else 1,
    )
    if arm.learns == "untied":
        config, injection = made.whole.config, base.model.layers[LAST - 1].trm
        injection.recursion = UntiedStack(64, 4, 168, arm.n, config.trm_rms_norm_eps, config.trm_attention)
    return made
