"""The decoder layers below the first injection point: what comes out of them, and forwards without them.

The language model's own forward goes on walking through all of its layers. Those below the point answer at
once with the hidden state that is handed in. The injection hook still runs behind the last of them. The
other inputs of the layers above (positions, masks, what is computed from the tokens) are as in any forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection_points import decoder_layers
from hybrid.training.processes import seed_everything


class LowerLayers:
    """The layers below the first injection point of `model`, of which nothing may learn.

    Errors: ValueError where something does, and for a first point on the embeddings.
    """

    def __init__(self, model: HybridModel) -> None:
        self.model, self.point = model, min(model.config.injection_layers)
        if self.point == 0:
            raise ValueError(
                "LowerLayers: expected a first injection point of at least 1, got 0: no layer is below it."
            )
        if model.config.lora_rank is not None:
            raise ValueError(
                "LowerLayers: expected no LoRA, which learns below the first injection point as well, got "
                f"lora_rank={model.config.lora_rank}."
            )
        if learning := [name for name, p in model.base_named_parameters() if p.requires_grad]:
            raise ValueError(
                "LowerLayers: expected a language model of which nothing learns (phase 1), got "
                f"{len(learning)} tensors that do, the first is {learning[0]}."
            )
        is_checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if is_checkpointing and model.needs_input_gradients:
            raise ValueError(
                "LowerLayers: expected gradient checkpointing with use_reentrant=False, got True, "
                "which differentiates down to the embeddings."
            )
        layers = list(decoder_layers(model.llm_model))
        self._layers, self._above = layers[: self.point], layers[self.point :]
        self._beside = 0  # what a layer answers beside the hidden state; falcon, bloom: attention weights

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """What comes out of them, [B, T, D], is put into the list, first that of the first forward."""
        found: list[Tensor] = []

        def record(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._beside = len(output) - 1 if isinstance(output, tuple) else 0
            found.append((output[0] if isinstance(output, tuple) else output).detach())

        # before the hook that injects
        handle = self._layers[-1].register_forward_hook(record, prepend=True)
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def left_out(self, h: Tensor) -> Iterator[None]:
        """Within the block h [B, T, D] comes out of them, uncomputed, in forward and in backward."""
        with _forwards(self._layers, partial(_answer, self._output(h))):
            yield

    @torch.no_grad()
    def compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """What comes out of them for `inputs`, [B, T, D]: a forward of the base without the layers above."""
        inputs = {name: t for name, t in inputs.items() if name != "labels"}

        def pass_on(h: Tensor, *_: Any, **__: Any) -> Any:
            return self._output(h)

        with self.model.disable_injection(), self.recorded() as found, _forwards(self._above, pass_on):
            self.model(**inputs, use_cache=False, logits_to_keep=1)
        return found[0]

    def _output(self, h: Tensor) -> Any:
        """What a layer answers."""
        return (h, *[None] * self._beside) if self._beside else h

    @torch.no_grad()
    def check(self) -> Tensor:
        """See on a few tokens that a forward without them is the same forward, bit for bit.

        Returns what came out of them, [2, 16, D]. Every process of a split model has to call it. It seeds the
        global random generators.

        Errors: ValueError where something random is active below the point, or where the layers above take
        more from those below than the hidden state.
        """
        tokens = torch.arange(1, 33, device=self.model.device).reshape(2, 16)
        was_training = self.model.training
        self.model.train()
        try:
            with self.recorded() as found:
                whole, drawn = self._forward(tokens, seed=0)
                self._forward(tokens, seed=1)
            with self.left_out(found[0]):
                without, drawn_without = self._forward(tokens, seed=0)
        finally:
            self.model.train(was_training)
        who = type(self.model.llm_model).__name__
        # the first finds dropout on the embeddings, the second any inside of the layers
        if not (torch.equal(found[0], found[1]) and torch.equal(drawn, drawn_without)):
            raise ValueError(
                f"LowerLayers: expected no dropout up to layer {self.point}, got a {who} that draws "
                "random numbers there: its config says how much it drops."
            )
        if not all(torch.equal(one, other) for one, other in zip(whole, without, strict=True)):
            raise ValueError(
                f"LowerLayers: expected layers after {self.point} that take nothing but the hidden state "
                f"from those before, got a {who} whose loss is another without these."
            )
        return found[0]

    def _forward(self, tokens: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((logits, loss), the state of the random generators after it)"""
        seed_everything(seed)
        output = self.model(input_ids=tokens, labels=tokens, use_cache=False, num_recursion_steps=1)
        states = [torch.get_rng_state()]
        if tokens.device.type != "cpu":
            states.append(torch.get_device_module(tokens.device).get_rng_state(tokens.device))
        return (output.logits, output.loss), torch.cat(states)


@contextmanager
def _forwards(layers: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block every one of `layers` answers by `forward`."""
    before = [vars(layer).get("forward") for layer in layers]  # an offloading hook puts one there
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _answer(output: Any, *_: Any, **__: Any) -> Any:
    return output
