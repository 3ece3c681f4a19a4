"""A training step on the CPU, every byte of which is watched: what the planner is held to."""

import gc
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig, Qwen3Config

from hybrid import HybridConfig, HybridModel
from hybrid.model.injection import Injection
from hybrid.model.injection_points import decoder_layers
from hybrid.plan.cards import CARDS
from hybrid.plan.memory import memory, units
from hybrid.plan.run import Run
from hybrid.training.optimizer import adamw
from hybrid.training.phases import enter
from trm_kernels.runtime.backend import backend

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 199}
_MLP = _SIZES | {"intermediate_size": 168, "num_key_value_heads": 4}
_TRM = {
    "injection_layers": [1, 2],
    "trm_hidden_size": 32,
    "trm_num_heads": 2,
    "trm_num_layers": 2,
    "trm_intermediate_size": 64,
    "num_recursion_steps": 2,
}
# (base, changes of the block, changes of the run)
CASES = {
    "llama": (LlamaConfig(**_MLP), {"trm_save": "all"}, {}),
    "qwen3, checkpointing": (
        Qwen3Config(**_MLP, head_dim=16),
        {"num_cycles": 2},
        {"checkpointing": True},
    ),
    "gpt2, gated, all cycles": (
        GPT2Config(**_SIZES, n_positions=64, bos_token_id=1, eos_token_id=2, attn_pdrop=0.0),
        {"blending_strategy": "gated", "num_cycles": 2, "grad_cycles": None},
        {},
    ),
    "phi, on the embeddings": (
        PhiConfig(**_MLP),
        {"injection_layers": [0, 2], "trm_dtype": "bfloat16"},
        {"batch_size": 3},
    ),
    "llama, deep supervision": (
        LlamaConfig(**_MLP | {"num_hidden_layers": 3}),
        {"num_cycles": 3, "grad_cycles": 2, "deep_supervision": True},
        {},
    ),
    "llama, wide": (
        LlamaConfig(**_MLP | {"tie_word_embeddings": True}),
        {"trm_hidden_size": 64, "trm_num_key_value_heads": 1, "trm_num_layers": 1},
        {"checkpointing": True, "sequence_length": 40},
    ),
}


class Bytes(NamedTuple):
    """On one rank."""

    weights: float
    kept: float
    gradients: float
    optimizer: float


class Allocations(TorchDispatchMode):
    """Knows every storage that an operator made, and which of them are still there."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            # a sharded tensor has its memory in the local one
            if isinstance(t, torch.Tensor) and t.device.type == "cpu" and not isinstance(t, DTensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = StorageWeakRef(storage)
        return out

    def alive(self):
        total = 0
        for ref in self.seen.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            total += 0 if storage is None else storage.nbytes()
        return total


def run_of(name, phase, shards, **more):
    base, block, changes = CASES[name]
    # float32 weights that learn are gathered in bfloat16 by FSDP2
    dtype = "float32" if phase == 2 and shards else "bfloat16"
    fields = {"cards": max(1, shards), "shards": max(1, shards), "phase": phase, "dtype": dtype}
    fields |= {"batch_size": 2, "sequence_length": 33, "is_fused": False}
    config = HybridConfig(**_TRM | block)
    return Run(name, base, config, CARDS["RTX4090"], **fields | changes | more)


def planned(run):
    found = memory(run)
    stays = 0  # FSDP2's root, gathered from forward to backward
    if run.is_wrapped:
        stays = run.compute_dtype.itemsize * sum(p.numel() for p in units(run)["root"])
    return Bytes(found.of("weights"), found.of("saved") + stays, found.of("gradients"), found.of("optimizer"))


def measured(run, stochastic_rounding=False):
    """One step, as `trm-hybrid train` takes it or, where the plan shards, on FSDP2."""
    torch.manual_seed(0)
    with Allocations() as allocations, backend("reference"):
        dtype = getattr(torch, run.dtype)
        base = AutoModelForCausalLM.from_config(run.base, dtype=dtype)
        model = HybridModel(llm_model=base, config=run.config)
        enter(model, 1 if run.lora else run.phase)
        if run.lora:
            model = _with_adapters(model, run.lora)
        if run.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if run.is_wrapped:
            _shard(model)
        model.train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if stochastic_rounding:
            optimizer = adamw(trained, 1e-4, (0.9, 0.95), 0.01, stochastic_rounding=True)
        else:
            optimizer = torch.optim.AdamW(trained.values())
        ids = torch.randint(3, 199, (run.batch_size, run.sequence_length))
        gc.collect()  # of what wrapping left behind
        before = allocations.alive()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = allocations.alive() - before
        loss.backward()
        gradients = _nbytes(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return Bytes(_nbytes(model.parameters()), kept, gradients, _nbytes(moments))


def _nbytes(tensors):
    """Of this rank's storages."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


def _shard(model):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Injection):
            # RoPE's angles come in float32, and stay so
            fully_shard(module, mp_policy=replace(policy, cast_forward_inputs=False))
    for layer in decoder_layers(model.llm_model):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def _with_adapters(model, rank):
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    return get_peft_model(
        model, LoraConfig(r=rank, target_modules=names, modules_to_save=["trm", "trm_before"])
    )


def as_rank(rank, world_size, folder, names):
    """Cases by name in both phases, measured as one rank of a gloo group."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    try:
        return {
            f"{name}, {phase}": measured(run_of(name, phase, shards=world_size))
            for name in names
            for phase in (1, 2)
        }
    finally:
        dist.destroy_process_group()
