"""What is planned: a hybrid, how it is trained, on which cards; and that hybrid on the meta device."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hybrid.config import HybridConfig, trm_fields
from hybrid.config_checks import TRM_DTYPES
from hybrid.info import on_meta, saved_by_injection
from hybrid.model.hybrid_model import HybridModel
from hybrid.model.injection import Injection
from hybrid.model.injection_points import decoder_layers
from hybrid.plan.cards import Card
from hybrid.plan.kept import ATTENTION, Kept, kept_by_step

DTYPES = (*TRM_DTYPES, "int8")


@dataclass(frozen=True, eq=False)
class Run:
    """One training.

    base_name, base     the language model's name and its config
    config              the recursive block's
    card, cards         which accelerator, how many
    phase               1: the TRMs learn; 2: the base as well
    sequence_length     tokens
    batch_size          sequences in one forward on one card
    accumulation        forwards before an optimizer step
    shards              cards that divide weights, gradients and moments (FSDP2); other cards repeat them
    dtype               of the base's parameters; "int8": of its linear layers, frozen, with a float32 a row
    lora                rank of adapters on the base's linear layers; in phase 2 they learn in its place
    checkpointing       layers and TRMs are computed again in backward
    is_fused            the TRMs run as Triton kernels; False: as the reference, on a CPU, keeping all

    Errors: ValueError for what cannot be combined.
    """

    base_name: str
    base: PreTrainedConfig
    config: HybridConfig
    card: Card
    cards: int = 1
    phase: int = 1
    sequence_length: int = 2048
    batch_size: int = 1
    accumulation: int = 1
    shards: int = 1
    dtype: str = "bfloat16"
    lora: int | None = None
    checkpointing: bool = False
    trust_remote_code: bool = False
    is_fused: bool = True
    _counted: dict[Any, Any] = field(default_factory=dict, repr=False)  # shared by all that `but` makes

    def __post_init__(self) -> None:
        self.config.check_base(self.base)
        for name in ("cards", "sequence_length", "batch_size", "accumulation", "shards", "lora"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"plan: expected {name} of at least 1, got {count}.")
        if self.phase not in (1, 2):
            raise ValueError(f"plan: expected a phase of 1 or 2, got {self.phase}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"plan: expected a dtype of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.cards % self.shards:
            raise ValueError(
                f"plan: expected a number of shards that divides {self.cards} cards, got {self.shards}."
            )
        if not self.is_fused and self.config.trm_save not in ("auto", "all"):
            raise ValueError(
                f"plan: expected trm_save all where TRMs run as the reference, got {self.config.trm_save}."
            )
        if self.trains_base and self.dtype in ("int8", "float16"):
            raise ValueError(
                f"plan: expected a base that learns in float32 or bfloat16, got {self.dtype}; "
                "with LoRA it stays frozen."
            )
        text_config = self.base.get_text_config(decoder=True)
        longest = getattr(text_config, "max_position_embeddings", None) or self.sequence_length
        if self.sequence_length > longest:
            raise ValueError(
                f"plan: expected a sequence length of at most {longest} tokens (the base's "
                f"max_position_embeddings), got {self.sequence_length}."
            )

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed."""
        return replace(self, **changes)

    @property
    def trains_base(self) -> bool:
        return self.phase == 2 and self.lora is None

    @property
    def is_wrapped(self) -> bool:
        """Whether FSDP2 gathers parameters unit by unit, in the dtype that it computes in.

        So wherever there are shards; and on single cards for float32 weights that learn in bfloat16.
        """
        return self.shards > 1 or (self.trains_base and self.dtype == "float32")

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.dtype == "int8" or (self.is_wrapped and self.dtype == "float32"):
            return torch.bfloat16
        return TRM_DTYPES[self.dtype]

    @property
    def tokens_of_card(self) -> int:
        """In one forward."""
        return self.batch_size * self.sequence_length

    @property
    def tokens_of_step(self) -> int:
        """Of all cards."""
        return self.cards * self.accumulation * self.tokens_of_card

    def once(self, what: str, count: Callable[[], Any]) -> Any:
        """count(), the first time that this is asked of an equal run."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name[0] != "_"}
        block = {name: getattr(self.config, name) for name in trm_fields()}
        key = (what, str(fields | {"base": id(self.base), "config": block}))
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def model(self) -> HybridModel:
        """On the meta device, as it is stored; int8 weights stand there in the dtype they compute in."""
        trm_dtype = TRM_DTYPES[self.config.trm_dtype]
        base_dtype = TRM_DTYPES[self.dtype] if self.dtype != "int8" else self.compute_dtype
        return self._model(base_dtype, trm_dtype, trm_dtype)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of model(), by name."""
        model = self.model()
        if ("parameters", id(model)) not in self._counted:
            self._counted["parameters", id(model)] = list(model.named_parameters())
        return self._counted["parameters", id(model)]

    def computing_model(self) -> HybridModel:
        """As it computes: under FSDP2 parameters arrive in one dtype, else each in its own."""
        if self.is_wrapped:
            return self._model(self.compute_dtype, self.compute_dtype, self.compute_dtype)
        return self.model()

    def _model(self, *dtypes: torch.dtype) -> HybridModel:
        """dtypes: the base's, the TRMs', the adapters'."""
        block = json.dumps({name: getattr(self.config, name) for name in trm_fields() if name != "trm_save"})
        key = ("model", id(self.base), block, self.phase, self.lora, dtypes)
        if key not in self._counted:
            base, config = copy.deepcopy(self.base), copy.deepcopy(self.config)
            base._attn_implementation = ATTENTION
            base.get_text_config(decoder=True).pad_token_id = None  # gpt2 would look for it among the tokens
            config.trm_dtype = str(dtypes[1]).removeprefix("torch.")
            try:
                model = on_meta(config, base, self.trust_remote_code, dtypes[0])
            except KeyError:  # falcon has a list of its own, without ours: as plain products, which keep more
                base._attn_implementation = "eager"
                model = on_meta(config, base, self.trust_remote_code, dtypes[0])
            model.freeze_base()
            if self.trains_base:
                model.requires_grad_(True)
            if self.lora is not None:
                _add_adapters(model, self.lora, dtypes[2])
            self._counted[key] = model
        return self._counted[key]

    def kept(self, save: str) -> Kept:
        """What one forward keeps for backward if the TRMs keep what `save` says.

        Counted once with "step"; by how much more another policy keeps is known of each TRM.
        """
        found = self._counted_kept(1)
        if self.batch_size > 1:
            one, two = asdict(found), asdict(self._counted_kept(2))
            found = Kept(**{k: one[k] + (self.batch_size - 1) * (two[k] - one[k]) for k in one})
        if not self.is_fused:
            return found
        by_trm = self.saved_by_trm(save) - self.saved_by_trm("step")
        everything = found.everything + len(self.config.injection_layers) * by_trm
        return replace(found, everything=everything, by_trm=found.by_trm + by_trm)

    def saved_by_trm(self, save: str) -> int:
        """Bytes that one TRM keeps on the kernels, weights left out."""
        injection = next(m for m in self.computing_model().modules() if isinstance(m, Injection))
        width = self.base.get_text_config(decoder=True).hidden_size
        h = torch.empty(self.batch_size, self.sequence_length, width, dtype=self.compute_dtype, device="meta")
        return saved_by_injection(injection, h, save, self.config.num_recursion_steps)

    def _counted_kept(self, batch_size: int) -> Kept:
        model = self.computing_model()
        key = ("kept", id(model), batch_size, self.sequence_length, self.is_fused)
        if key not in self._counted:
            model.config.trm_save = "step" if self.is_fused else "all"
            self._counted[key] = kept_by_step(model, batch_size, self.sequence_length, self.is_fused)
        return self._counted[key]


def linear_layers(model: HybridModel) -> list[nn.Linear]:
    """Those of the language model's decoder layers: what is quantised, and what gets adapters."""
    layers = decoder_layers(model.llm_model)
    return [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]


def _add_adapters(model: HybridModel, rank: int, dtype: torch.dtype) -> None:
    """LoRA on every linear layer, computed as peft does: the input is brought to the adapter's dtype."""
    linears = linear_layers(model)
    if not linears:
        raise ValueError(
            f"plan: expected a base with nn.Linear layers for LoRA, got {type(model.llm_model).__name__}."
        )
    for linear in linears:
        options: dict[str, Any] = {"device": "meta", "dtype": dtype}
        linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **options))
        linear.lora_b = nn.Parameter(torch.empty(linear.out_features, rank, **options))
        linear.register_forward_hook(_adapt)


def _adapt(linear: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    x = args[0].to(linear.lora_a.dtype)
    return (out + F.linear(F.linear(x, linear.lora_a), linear.lora_b)).to(out.dtype)
