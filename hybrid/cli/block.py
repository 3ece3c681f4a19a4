"""HybridConfig from the options of the command line: fields, a JSON file, or a preset."""

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hybrid.config import HybridConfig, meant_field, trm_fields
from hybrid.config_values import read_json_object
from hybrid.error_text import did_you_mean
from hybrid.presets import PRESETS

_SHARES = {"middle": 0.5, "last": 1.0}


def given_fields(arguments: argparse.Namespace) -> list[str]:
    """The options that say something about the block: fields, --preset and --config."""
    whole = [name for name in ("preset", "config") if getattr(arguments, name) is not None]
    return whole + [name for name in trm_fields() if hasattr(arguments, name)]


def config_of(arguments: argparse.Namespace, base: PreTrainedConfig) -> HybridConfig:
    """The config that the options make, for a base with this config: after its middle and its last layer,
    where they name no points.

    Errors: ValueError for what cannot be combined, a field that there is not, a file that is no JSON object.
    """
    fields: dict[str, Any] = {}
    if arguments.preset is not None:
        preset = PRESETS[arguments.preset]()
        fields = {name: getattr(preset, name) for name in trm_fields()}
    elif arguments.config is not None:
        fields = _read(arguments.config)
    fields |= {name: getattr(arguments, name) for name in trm_fields() if hasattr(arguments, name)}
    depth = base.get_text_config(decoder=True).num_hidden_layers
    points = fields.get("injection_layers")
    if points is None:
        points = sorted({max(1, _point(share, depth)) for share in ("middle", "last")})
    elif isinstance(points, list):
        points = [_point(point, depth) for point in points]
    return HybridConfig(**fields | {"injection_layers": points})


def _point(point: Any, depth: int) -> Any:
    """After how many of `depth` layers: a number, a share of them such as "0.5", "middle" or "last"."""
    if not isinstance(point, str | float):
        return point
    try:
        share = _SHARES[point] if point in _SHARES else float(point)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(
            f"expected --injection-layers in 0..{depth}, shares in 0.0..1.0, middle or last, got {point}."
        )
    return round(share * depth)


def _read(path: Path) -> dict[str, Any]:
    """The fields in a JSON file; of a saved hybrid's config.json, those that are about the block."""
    fields = read_json_object(path, "fields of HybridConfig")
    if fields.get("model_type") == HybridConfig.model_type:
        return {name: fields[name] for name in trm_fields() if name in fields}
    if others := [name for name in fields if name not in trm_fields()]:
        hint = did_you_mean(meant_field(others[0], trm_fields()))
        raise ValueError(
            f"{path}: expected fields of HybridConfig ({', '.join(trm_fields())}), got {others[0]!r}{hint}"
        )
    return fields
