"""trm-hybrid info."""

import argparse

from hybrid.cli.common import block


def run(arguments: argparse.Namespace) -> int:
    from hybrid.bases import KNOWN_BASES, PRESET_BASES
    from hybrid.info import count, count_trained, on_meta, parts, saved_by_token, settings
    from hybrid.saving.loading import load_config
    from hybrid.training.phases import enter
    from trm_kernels.recursion.saved_bytes import SAVES

    name = arguments.base or PRESET_BASES.get(arguments.preset)
    if name is None:
        raise ValueError(
            "info: expected --base, a saved hybrid as --model, or the --preset of a level; got none."
        )
    start = KNOWN_BASES.get(name.lower()) or load_config(name, arguments.trust_remote_code)
    config, base = block(start, arguments)
    model = on_meta(config, base, arguments.trust_remote_code)

    rows = [(part.name, part.parameters) for part in parts(model)]
    rows.append(("total", count(model)))
    for phase in (1, 2):
        enter(model, phase)
        rows.append((f"trained in phase {phase}", count_trained(model)))
    points = ", ".join(map(str, config.injection_layers))
    print(f"parameters of {name} with a TRM of width {config.trm_hidden_size} after layers {points}")
    for row, parameters in rows:
        print(f"{row:<24}{parameters:>20,}")
    place = config.base_model_name_or_path or "in the same folder" if config is start else name
    print("settings")
    for setting, value in (*settings(config), ("base", place)):
        print(f"{setting:<24}{value:>20}")
    print("bytes that the TRMs keep of a token for backward, in bfloat16, by trm_save")
    for save in SAVES:
        print(f"{save:<24}{saved_by_token(model, save):>20,}")
    return 0
