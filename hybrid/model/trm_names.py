"""Which names of a hybrid's parameters and modules are those of its TRMs."""

INJECTION_NAMES = ("trm", "trm_before")  # of a decoder layer's child after it, and of point 0's


def is_trm_key(name: str) -> bool:
    """Whether a parameter belongs to a TRM: the training guide's own rule."""
    return "trm" in name.lower()


def is_injection_name(name: str) -> bool:
    """Whether a module's full name is that of an injection point, or of what PEFT made of one."""
    return name.rpartition(".")[2] in INJECTION_NAMES
