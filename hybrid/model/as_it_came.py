"""What wrapping a language model may change in it besides its modules, so that unwrapping can put it back."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class AsItCame:
    """Of a language model before it was wrapped."""

    learns: dict[str, bool]
    is_training: bool
    has_checkpoints: bool
    config: dict[str, Any]
    loss_function: Any

    @classmethod
    def of(cls, model: PreTrainedModel) -> "AsItCame":
        """Look at `model`, and change nothing."""
        return cls(
            {name: p.requires_grad for name, p in model.named_parameters()},
            model.training,
            has_checkpoints(model),
            _fields(model.config),
            vars(model).get("_loss_function"),
        )

    def restore(self, model: PreTrainedModel) -> None:
        """Put back all that was looked at; the config's parts stay the objects that the layers know."""
        for name, p in model.named_parameters():
            p.requires_grad_(self.learns.get(name, p.requires_grad))
        model.train(self.is_training)
        _put_back(model.config, self.config)
        if self.loss_function is None:
            vars(model).pop("_loss_function", None)
        else:
            model._loss_function = self.loss_function


def has_checkpoints(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on; versions of transformers call that by several names."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        name: _fields(value) if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
        for name, value in vars(config).items()
    }


def _put_back(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    own = vars(config)
    for name in [name for name in own if name not in fields]:
        del own[name]
    for name, value in fields.items():
        if isinstance(own.get(name), PreTrainedConfig):
            _put_back(own[name], value)
        else:
            own[name] = copy.deepcopy(value)


class GivenBack(nn.Module):
    """Stands where the language model was in a hybrid that has given it back: it can be asked nothing."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(_GIVEN_BACK)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:  # also asked for a hybrid's parameters
        raise ValueError(_GIVEN_BACK)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(_GIVEN_BACK)


_GIVEN_BACK = (
    "HybridModel: expected a model that is whole, got one that was unwrapped: make a new one, "
    "HybridModel(llm_model=base, config=config)."
)
