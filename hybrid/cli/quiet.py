"""What packages tell of themselves when transformers or peft imports them, and is not about this run."""

import logging


def quiet() -> None:
    """torchao on libraries for other machines and on an Enum, bitsandbytes on a faster product on a CPU.

    Called before any of them is imported: they log while they are.
    """
    for name in ("torchao", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "is an Enum subclass" not in record.getMessage()
