"""What packages tell of themselves when transformers or peft imports them, and is not about this run."""

import logging
import warnings


def quiet() -> None:
    """torchao on libraries for other machines and on an Enum, bitsandbytes on a faster product on a CPU, and
    transformers on a name by which peft asks it.

    Called before any of them is imported: they log while they are.
    """
    for name in ("torchao", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_of_use)
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "is an Enum subclass" not in record.getMessage()
