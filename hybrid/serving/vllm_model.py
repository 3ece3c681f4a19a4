"""A hybrid in vLLM, on its Transformers backend: any language model that the backend takes.

The language model is transformers' own, with vLLM's linear layers and attention inside. After a layer a hook
injects. Each evaluation of a TRM layer has an attention of vLLM's, so paging, prefix caching and chunked
prefill are vLLM's. How many there are is fixed when the server starts: n is the config's, which
`--hf-overrides` may change.

The rest of a recursion runs op by op: by the kernels of trm_kernels where Triton runs on the device, else in
PyTorch. Which it is stands in the log.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.transformers import TransformersForCausalLM

from hybrid.config import HybridConfig
from hybrid.model.injection import Injection, trm_evaluations
from hybrid.model.injection_points import decoder_layers
from hybrid.serving.vllm_attention import PagedAttention, RowAttention, TokenRow
from trm_kernels.ops.attention.rope import rope_angles
from trm_kernels.recursion.weights import InjectionWeights
from trm_kernels.runtime.backend import runs_triton

logger = init_logger(__name__)
_OF_HYBRID = "llm_model."  # before the names of all tensors in a hybrid's file


class PagedInjection(Injection):
    """An injection point whose attention is vLLM's.

    first   the number of its first evaluation among all layers that have keys, the language model's before
    """

    def __init__(self, model: "HybridForCausalLM", index: int, first: int) -> None:
        config: HybridConfig = model.config
        super().__init__(config, model.text_config.hidden_size, 0, index, torch.device("meta"))
        self.spec = replace(config.recursion_spec, attention="auto", regime="per_op")
        heads, key_value_heads = self.spec.num_heads, self.spec.num_key_value_heads
        width = config.trm_hidden_size // heads
        # vLLM sorts layers by the number in their name, of which there has to be one
        self.paged = torch.nn.ModuleList(
            PagedAttention(heads, key_value_heads, width, model.vllm_config, f"trm.{first + i}.attn")
            for i in range(trm_evaluations(config, self.spec, None))
        )

    def forward(self, h: Tensor, row: TokenRow) -> Tensor:  # type: ignore[override]
        """h' [1, T, D]"""
        gate = (self.gate_weight.to(h.dtype), self.gate_bias.to(h.dtype)) if self.is_gated else ()
        blended = self.recursion(
            h,
            injection=InjectionWeights(self.in_proj().to(h.dtype), self.out_proj().to(h.dtype), *gate),
            strength=self.config.injection_strength,
            spec=self.spec,
            norms_x=self.config.trm_input_norm,
            attend=RowAttention(self.paged, row),
        )
        assert isinstance(blended, Tensor)
        return blended


class HybridForCausalLM(TransformersForCausalLM):
    """The language model that a hybrid's config.json names, the TRMs inside.

    Errors: ValueError for what was not shown to give what generate() gives, see `_refuse`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: HybridConfig = vllm_config.model_config.hf_config
        _refuse(vllm_config, config)
        self._row: TokenRow | None = None
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if config.base_model_name_or_path is not None:  # else it is in the hybrid's own files
            self.secondary_weights = [
                DefaultModelLoader.Source(
                    config.base_model_name_or_path,
                    revision=config.base_revision,
                    subfolder=config.base_subfolder,
                    fall_back_to_pt=False,  # no pickles
                )
            ]

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        return {**super()._from_config_kwargs, "config": self.config.base_config}

    def _create_attention_instances(self, prefix: str = "") -> None:
        super()._create_attention_instances(prefix)
        config: HybridConfig = self.config
        layers = decoder_layers(self.model)
        first = self.text_config.num_hidden_layers
        for index, point in enumerate(config.injection_layers):
            layer: Any = layers[max(point - 1, 0)]
            injection = PagedInjection(self, index, first)
            first += len(injection.paged)
            if point == 0:
                layer.trm_before = injection
                layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            else:
                layer.trm = injection
                layer.register_forward_hook(self._after_layer)

    def _after_layer(self, layer: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (layer.trm(output[0], self._row), *output[1:])
        return layer.trm(output, self._row)

    def _before_layer(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (layer.trm_before(args[0], self._row), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": layer.trm_before(kwargs["hidden_states"], self._row)}

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; positions [T] of the tokens of all sequences."""
        config: HybridConfig = self.config
        width = config.trm_hidden_size // config.trm_num_heads
        if self._row is None:
            _say_what_runs(positions.device, self.model_config.dtype)
        self._row = TokenRow(positions, rope_angles(positions[None], width, config.trm_rope_theta))
        return super().forward(input_ids, positions, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Those of the hybrid's files and of the language model's."""
        return super().load_weights((name.removeprefix(_OF_HYBRID), tensor) for name, tensor in weights)


def _say_what_runs(device: torch.device, dtype: torch.dtype) -> None:
    by = (
        "Triton kernels"
        if runs_triton("trm_recursion", torch.empty(0, device=device, dtype=dtype))
        else "PyTorch"
    )
    logger.info("The recursion runs op by op, in %s on %s; its attention is vLLM's.", by, device)


def _refuse(vllm_config: VllmConfig, config: HybridConfig) -> None:
    """Errors: ValueError for what nobody has seen give what generate() gives, and how to do without."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    base_quantization = getattr(config.base_config, "quantization_config", None)
    expected = {
        "--pipeline-parallel-size 1": parallel.pipeline_parallel_size == 1,
        "--enforce-eager: a recursion is not part of vLLM's CUDA graphs": model.enforce_eager,
        "no --quantization, and a base that is not quantized": model.quantization
        is base_quantization
        is None,
        "no --enable-lora": vllm_config.lora_config is None,
        "no speculative decoding": vllm_config.speculative_config is None,
        "--load-format auto or safetensors": vllm_config.load_config.load_format in ("auto", "safetensors"),
        "a hybrid without lora_rank": config.lora_rank is None,
        "trm_quantize None": config.trm_quantize is None,
        "trm_regime auto or per_op: one launch cannot read pages": config.trm_regime in ("auto", "per_op"),
        "a base in safetensors files, not GGUF": config.base_gguf_file is None,
    }
    for what, holds in expected.items():
        if not holds:
            raise ValueError(f"HybridModel: under vLLM expected {what}.")
