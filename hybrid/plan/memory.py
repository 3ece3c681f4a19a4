"""Bytes on each card, by what they are for. GB are 10^9 bytes.

Counted from the model: weights, gradients, AdamW's two moments (in the parameter's dtype, and 4 bytes a
tensor for its step; the same with stochastic rounding), and what autograd keeps; with LoRA also the TRMs as
they were found, of which peft's modules_to_save keeps a copy. Assumed, on top of that, as workspace:

    logits              in the dtype it computes in and in float32, beside the log-softmax that is kept
    backward of a unit  gradients inside the largest layer or TRM: as much as it keeps; and as much once more
                        where it is computed again
    sums of a TRM       its weights' gradients in float32, and as computed, when its recursion was walked back
    a step again        with trm_save layer or step: what one layer or one step keeps inside
    gathered units      FSDP2: the root (embeddings, head), which stays, the largest unit, and the next
    reduced gradients   FSDP2: of the largest unit that learns, as computed and in float32; with a TRM's sums
    DDP's buckets       cards that repeat the weights: as large as the gradients
    one int8 layer      the largest linear layer, brought to bfloat16
    CUDA                the context and the libraries: 1.0 GB

Gradients are counted as if they were all there while everything is kept, as with accumulation they are.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hybrid.model.injection import Injection
from hybrid.model.injection_points import decoder_layers
from hybrid.model.trm_names import is_trm_key
from hybrid.plan.run import Run, linear_layers
from trm_kernels.recursion.saved_bytes import POLICIES, SAVES, save_that_fits, saved_bytes

CUDA_BYTES = 1.0e9  # assumed: of the context and of cuBLAS, 0.5 to 1 GB are seen
_STEP_BYTES = 4  # AdamW's float32 count of steps, a tensor each


@dataclass(frozen=True)
class Memory:
    """On each card.

    rows       bytes by what they are for; see the top of this file
    save       what the TRMs keep: "auto" decided
    capacity   of the card
    """

    rows: dict[str, float]
    save: str
    capacity: float

    @property
    def total(self) -> float:
        return sum(self.rows.values())

    @property
    def headroom(self) -> float:
        return self.capacity - self.total

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    def of(self, kind: str) -> float:
        """The sum of the rows that begin so."""
        return sum(size for name, size in self.rows.items() if name.startswith(kind))


def memory(run: Run) -> Memory:
    """What a training takes on each card."""
    return run.once("memory", lambda: _memory(run))


def fits(run: Run) -> bool:
    """Whether it fits; what stays there from step to step is looked at first, for it is quickly known."""
    return sum(_lasting(run).values()) <= run.card.memory_bytes and memory(run).fits


def _memory(run: Run) -> Memory:
    lasting = _lasting(run)
    save = _save(run, run.card.memory_bytes - sum(lasting.values()) + lasting["gradients"])
    kept = run.kept(save)
    rows = lasting | {"saved activations": kept.checkpointed if run.checkpointing else kept.everything}
    workspace = _workspace(run, save, lasting["gradients"], kept.largest)
    rows |= {f"workspace: {name}": size for name, size in workspace.items()}
    return Memory({name: size for name, size in rows.items() if size}, save, run.card.memory_bytes)


def _lasting(run: Run) -> dict[str, float]:
    """Weights, gradients and the optimizer's state."""
    trained = [p for _, p in run.parameters() if p.requires_grad]
    gradients = float(sum(_local(p, run.shards) * p.element_size() for p in trained))
    optimizer = 2 * gradients + _STEP_BYTES * len(trained)
    return run.once("stored", lambda: _stored(run)) | {"gradients": gradients, "optimizer": optimizer}


def saved_by_policy(run: Run) -> dict[str, tuple[int, int]]:
    """trm_save -> bytes kept (without, with gradient checkpointing)."""
    return {save: ((kept := run.kept(save)).everything, kept.checkpointed) for save in SAVES}


def units(run: Run) -> dict[str, list[nn.Parameter]]:
    """What FSDP2 gathers at a time: each layer, each TRM, and the root with the rest."""
    return run.once("units", lambda: _units(run))


def _units(run: Run) -> dict[str, list[nn.Parameter]]:
    model = run.model()
    found: dict[str, list[nn.Parameter]] = {}
    for number, layer in enumerate(decoder_layers(model.llm_model), start=1):
        for name, module in layer.named_children():
            if isinstance(module, Injection):
                found[f"{name} of layer {number}"] = list(module.parameters())
        of_trm = {id(p) for name, p in layer.named_parameters() if is_trm_key(name)}
        found[f"layer {number}"] = [p for p in layer.parameters() if id(p) not in of_trm]
    taken = {id(p) for parameters in found.values() for p in parameters}
    found["root"] = [p for p in model.parameters() if id(p) not in taken]
    return found


def _local(p: torch.Tensor, shards: int) -> int:
    """Elements of p on one card: FSDP2 divides rows, and the first cards have the larger part."""
    return -(-p.shape[0] // shards) * (p.numel() // p.shape[0])


def _stored(run: Run) -> dict[str, float]:
    model = run.model()
    in_int8 = {id(m.weight) for m in linear_layers(model)} if run.dtype == "int8" else set()
    sizes = {"weights: base": 0.0, "weights: LoRA": 0.0, "weights: TRM": 0.0}
    for name, p in run.parameters():
        part = "TRM" if is_trm_key(name) else "LoRA" if ".lora_" in name else "base"
        each = p.element_size()
        if id(p) in in_int8:
            sizes["weights: base"] += _local(p, run.shards) + 4 * -(-p.shape[0] // run.shards)
        else:
            sizes[f"weights: {part}"] += _local(p, run.shards) * each
    if run.lora is not None:
        sizes["weights: TRM, peft's copy"] = sizes["weights: TRM"]
    return sizes


def _save(run: Run, free: float) -> str:
    """`trm_save`, with "auto" decided as the kernels would for the last injection, where least is free."""
    if run.config.trm_save != "auto":
        return run.config.trm_save
    if not run.is_fused:
        return "all"
    kept = run.kept("all")
    wanted = run.saved_by_trm("all")
    before = kept.checkpointed if run.checkpointing else kept.everything - wanted
    return save_that_fits(wanted, free - before)


def _one_evaluation(run: Run, save: str) -> int:
    """Bytes that a layer, or all layers of a step, hold while they are computed again."""
    d = run.config.trm_hidden_size
    x = torch.empty(run.batch_size, run.sequence_length, d, dtype=run.compute_dtype, device="meta")
    injection = next(m for m in run.model().modules() if isinstance(m, Injection))
    weights = [layer(run.compute_dtype) for layer in injection.recursion.layers]
    weights = weights[:1] if POLICIES[save].computes_again == "layer" else weights
    return saved_bytes("all", x, weights, run.config.trm_num_heads)


def _workspace(run: Run, save: str, gradients: float, largest_unit: int) -> dict[str, float]:
    text_config = run.base.get_text_config(decoder=True)
    itemsize = run.compute_dtype.itemsize
    model = run.model()
    sums = max(
        sum(p.numel() for p in m.recursion.parameters()) for m in model.modules() if isinstance(m, Injection)
    )
    sizes: dict[str, float] = {
        "logits": run.tokens_of_card * text_config.vocab_size * (itemsize + 4),
        "backward of a unit": largest_unit * (2 if run.checkpointing else 1),
    }
    if run.is_fused and POLICIES[save].computes_again is not None:
        sizes["a step again"] = _one_evaluation(run, save)
    if not run.is_wrapped:
        sizes["sums of a TRM"] = sums * (4 if itemsize == 4 else 4 + itemsize)
    else:
        by_unit = units(run)
        root = itemsize * sum(p.numel() for p in by_unit["root"])
        others = [unit for name, unit in by_unit.items() if name != "root"]
        sizes["gathered units"] = root + 2 * itemsize * max(sum(p.numel() for p in unit) for unit in others)
        learning = max(sum(p.numel() for p in unit if p.requires_grad) for unit in others)
        sizes["reduced gradients"] = (itemsize + 4) * learning
    if run.cards > 1 and not run.is_wrapped:
        sizes["DDP's buckets"] = gradients
    if run.dtype == "int8":
        sizes["one int8 layer"] = 2 * max(m.weight.numel() for m in linear_layers(model))
    if run.is_fused:
        sizes["CUDA"] = CUDA_BYTES
    return sizes
