"""A hybrid without its head: layers and injections, up to the last hidden state.

Trainers that make the logits themselves, a few tokens at a time (TRL), call `model.base_model(...)` and want
`last_hidden_state`. The language model's own decoder would give one that no TRM has touched.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hybrid.model.cache_name import takes_cache
from hybrid.model.halting import Halting

if TYPE_CHECKING:
    from hybrid.model.hybrid_model import HybridModel


class Backbone(nn.Module):
    """The language model's decoder as `hybrid` runs it: a call of it goes through the TRMs.

        hybrid.base_model(input_ids).last_hidden_state          # [B, T, D], after the last norm
        hybrid.get_decoder().layers                             # whatever else is asked for is the decoder's

    It is a view, made whenever it is asked for: it has the decoder's own children under their own names, and
    what is set on it is set on the decoder. So nothing is registered twice, and no name changes.
    """

    def __init__(self, hybrid: "HybridModel", decoder: nn.Module) -> None:
        super().__init__()
        own = vars(self)
        del own["training"]  # the decoder's
        own.update({name: vars(decoder)[name] for name in ("_parameters", "_buffers", "_modules")})
        own.update({"_hybrid": hybrid, "_decoder": decoder})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._decoder, name, value)

    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_recursion_steps: int | None = None,
        halting: Halting | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder's forward with the TRMs' answers blended in; arguments as HybridModel.forward's.

        Errors: as HybridModel.forward; ValueError for TokenHalting, which chooses among logits, and in
        training with deep_supervision, whose loss is the model's own.
        """
        return self._hybrid.run_decoder(
            self._decoder,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            num_recursion_steps,
            halting,
            **kwargs,
        )
