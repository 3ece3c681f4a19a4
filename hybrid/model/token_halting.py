"""A forward under TokenHalting: each token is answered at the n from which on its top token stays."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybrid.model.halting import ForwardSteps, TokenHalting, record_steps, recording, until_settled
from hybrid.model.masks import tokens_of
from hybrid.model.settled_call import masks_of, recursion_steps

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import HybridModel


def forward_until_settled(
    hybrid: "HybridModel",
    inputs: Tensor,
    rule: TokenHalting,
    given: dict[str, Any],
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    num_recursion_steps: int | None,
    others: dict[str, Any],
) -> CausalLMOutputWithPast:
    """A forward under TokenHalting: each token's logits of the n at which its top token has stayed.

    given    attention_mask and position_ids, as HybridModel.forward got them
    others   what else it got, for the language model
    """
    if torch.is_grad_enabled() and any(p.requires_grad for p in hybrid.parameters()):
        raise RuntimeError(
            "HybridModel: TokenHalting expected a call without gradient (torch.no_grad()), got one with."
        )
    if torch.compiler.is_compiling() or isinstance(given["attention_mask"], dict):
        raise RuntimeError("HybridModel: TokenHalting expected no torch.compile, got a call made for one.")
    if asked := [k for k in ("output_hidden_states", "output_attentions") if others.get(k)]:
        raise ValueError(f"HybridModel: TokenHalting gives logits and a loss, got {asked[0]}.")
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    with_rows: dict[str, Tensor | None] = {name: inputs, **given}
    B, T = inputs.shape[:2]

    def logits_at(n: int, sequences: Tensor) -> Tensor:
        # of tensors with a row a sequence, these sequences' rows
        some = {k: t[sequences] if t is not None and t.shape[0] == B else t for k, t in with_rows.items()}
        return hybrid(**some, num_recursion_steps=n, halting=False, use_cache=False, **others).logits

    _, what = masks_of(hybrid, inputs, given["attention_mask"], given["position_ids"], None)
    is_token = tokens_of(what, T, None, hybrid.num_base_layers)
    is_token = torch.ones(B, T, dtype=torch.bool, device=inputs.device) if is_token is None else is_token
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    most, num_cycles = recursion_steps(hybrid, num_recursion_steps, None), hybrid.config.num_cycles
    with record_steps():  # of the forwards inside; what is recorded outside is their sum
        settled = until_settled(
            logits_at, rule, most, is_token, what.mask, keep, lambda n: num_cycles * (n + 1)
        )
    logits, loss = settled.logits[:, keep], None
    if labels is not None:
        loss = hybrid.llm_model.loss_function(
            logits=logits, labels=labels, vocab_size=hybrid.config.get_text_config(decoder=True).vocab_size
        )
    if (record := recording()) is not None:
        of_kept = (settled.steps.float(), settled.evaluations.float(), is_token)
        record.forwards.append(ForwardSteps(*(t[:, keep].cpu() for t in of_kept)))
    return CausalLMOutputWithPast(loss=loss, logits=logits)
