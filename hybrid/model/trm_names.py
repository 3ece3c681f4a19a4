"""Which names of a hybrid's parameters and modules are those of its TRMs."""


def is_trm_key(name: str) -> bool:
    """Whether a parameter belongs to a TRM: the training guide's own rule."""
    return "trm" in name.lower()
