"""The plans and machine code of declared variants, as C source for the library that CMakeLists.txt builds.

    python -m trm_kernels.export.native --variants native/variants.toml --arch 90 --out sm90.c
    python -m trm_kernels.export.native --variants native/variants.toml --index 80 89 90 --out variants.c

The first compiles the kernels for one GPU; the second lists what the first made for each. What the structs
mean stands in native/src/plan.h, what a plan is in trm_kernels/export/launch_plan.py.
"""

import argparse
import struct
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from trm_kernels.export.compile import SHARED_LIMIT, Compiled
from trm_kernels.export.launch_plan import (
    Address,
    Argument,
    CopyStep,
    KernelStep,
    LaunchPlan,
    Sizes,
    Term,
    Variant,
    compiled,
    decode_keys,
    plan,
    row_limits,
)
from trm_kernels.modules.trm import TRM
from trm_kernels.runtime import tuning

_ONE = Term(1)


def read_variants(path: Path) -> list[Variant]:
    """What the file declares, one table a variant. Errors: ValueError for what is no variant."""
    with path.open("rb") as file:
        declared = tomllib.load(file)
    known = set(Variant.__dataclass_fields__) - {"name"}
    variants = []
    for name, values in declared.items():
        if not isinstance(values, dict) or not name.replace("_", "").isalnum() or not name.isascii():
            raise ValueError(f"{path}: expected tables named by letters, digits and _, got {name!r}.")
        if wrong := set(values) - known:
            raise ValueError(f"{path}: {name}: expected some of {sorted(known)}, got {sorted(wrong)}.")
        variants.append(Variant(name, **values))
    if not variants:
        raise ValueError(f"{path}: expected at least one variant, got none.")
    return variants


def weights_of(variant: Variant) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight, in the order in which plan.py numbers them."""
    v = variant
    module = TRM(
        v.hidden_size,
        v.num_heads,
        v.num_layers,
        num_key_value_heads=v.num_key_value_heads,
        intermediate_size=v.intermediate_size,
        device="meta",
    )
    names = dict(module.named_parameters())
    initial = [names.pop(name) for name in ("y_init", "z_init")]
    return [*((name, tuple(t.shape)) for name, t in names.items())] + [
        (name, tuple(t.shape)) for name, t in zip(("y_init", "z_init"), initial, strict=True)
    ]


class _Tables:
    """What all variants of one GPU share: each thing once, and its number."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.kernels: dict[bytes, tuple[int, Compiled]] = {}
        self.terms: dict[Term, int] = {}
        self.arguments: dict[tuple[str, ...], int] = {}
        self.num_arguments = 0

    def kernel(self, kernel: Compiled) -> int:
        return self.kernels.setdefault(kernel.cubin, (len(self.kernels), kernel))[0]

    def term(self, term: Term) -> int:
        return self.terms.setdefault(term, len(self.terms))

    def first_argument(self, arguments: Iterable[Argument]) -> tuple[int, int]:
        """Where a step's arguments begin, and how many there are."""
        lines = tuple(self._argument(a) for a in arguments)
        if lines not in self.arguments:
            self.arguments[lines] = self.num_arguments
            self.num_arguments += len(lines)
        return self.arguments[lines], len(lines)

    def _argument(self, argument: Argument) -> str:
        value = argument.value
        if isinstance(value, Address):
            role = f"TRM_ROLE_{value.buffer.role.upper()}"
            return f"{{TRM_POINTER, {role}, {value.buffer.index}, {self.term(value.offset)}, 0}}"
        if isinstance(value, Term):
            return f"{{TRM_{argument.kind.upper()}, 0, 0, {self.term(value)}, 0}}"
        return f"{{TRM_F32, 0, 0, 0, {_as_float(value)}}}"

    def step(self, step: KernelStep | CopyStep) -> str:
        if isinstance(step, CopyStep):
            numbers = [step.width, step.height, step.depth, step.target_pitch, step.source_pitch]
            numbers += [step.target_height, step.source_height]
            places = [Argument("pointer", place) for place in (step.target, step.source)]
            first, count = self.first_argument([*places, *(Argument("i64", n) for n in numbers)])
            one = self.term(_ONE)
            return f"{{TRM_COPY, {count}, {first}, {{{one}, {one}, {one}}}}}"
        kernel, arguments = compiled(step, self.arch)
        first, count = self.first_argument(arguments)
        grid = ", ".join(str(self.term(axis)) for axis in step.grid)
        return f"{{{self.kernel(kernel)}, {count}, {first}, {{{grid}}}}}"


def _as_float(value: float) -> str:
    """A float32 as C writes it, to the bit."""
    return f"{struct.unpack('f', struct.pack('f', value))[0].hex()}f"


def _array(kind: str, name: str, items: Iterable[str], linkage: str = "static ") -> str:
    """An array, which C does not allow to be empty."""
    lines = "".join(f"    {item},\n" for item in items) or "    0,\n"
    return f"{linkage}const {kind} {name}[] = {{\n{lines}}};\n"


def _c_rows(max_rows: int) -> str:
    """A limit as C writes it; a call's sizes are checked each, their product may be beyond ANY_ROWS."""
    return "INT64_MAX" if max_rows == tuning.ANY_ROWS else str(max_rows)


def _mask(names: Sequence[str]) -> int:
    return sum(1 << Sizes._fields.index(name) for name in names)


def _words(cubin: bytes) -> list[str]:
    """The machine code as 64-bit words, eight a line: compilers are slow with bytes."""
    padded = cubin + bytes(-len(cubin) % 8)
    words = [f"0x{word:x}" for (word,) in struct.iter_unpack("<Q", padded)]
    return [", ".join(words[i : i + 8]) for i in range(0, len(words), 8)]


def _program(variant: Variant, arch: str, plans: Sequence[LaunchPlan], tables: _Tables) -> str:
    """Everything of one variant but what it shares with others."""
    name, text = variant.name, ""
    of_plans = []
    for each in plans:
        of_call = f"{name}_{each.call.replace('-', '_')}_{each.max_rows}"
        text += _array("trm_step", f"steps_{of_call}", map(tables.step, each.steps))
        text += _array("uint16_t", f"work_{of_call}", (str(tables.term(size)) for size in each.work))
        arrays = f"steps_{of_call}, work_{of_call}, {len(each.steps)}, {len(each.work)}"
        of_plans.append(f'{{"{each.call}", {_c_rows(each.max_rows)}, {arrays}}}')
    text += _array("trm_plan", f"plans_{name}", of_plans)
    weights = weights_of(variant)
    text += _array(
        "trm_weight",
        f"weights_{name}",
        (f'{{"{key}", {shape[0]}, {shape[1] if len(shape) > 1 else 0}}}' for key, shape in weights),
    )
    used = {
        tables.kernel(compiled(s, arch)[0]) for each in plans for s in each.steps if isinstance(s, KernelStep)
    }
    text += _array("uint16_t", f"uses_{name}", map(str, sorted(used)))
    keys = decode_keys(variant, arch)
    shared = f"&trm_variant_{name}, {arch[2:]}, {keys}, kernels, terms, arguments"
    return (
        f"{text}const trm_program trm_{arch}_{name} = {{\n"
        f"    {shared}, plans_{name}, {len(plans)},\n"
        f"    weights_{name}, {len(weights)}, uses_{name}, {len(used)},\n}};\n"
    )


def plans_of(variant: Variant, arch: str) -> list[LaunchPlan]:
    """All plans of a variant, those of a call by ascending rows: the first that serves is taken."""
    limits = row_limits(variant, arch)
    return [plan(variant, call, arch, max_rows) for call in variant.calls for max_rows in limits]


def source_of_arch(variants: Sequence[Variant], arch: str) -> str:
    """C source with the plans and kernels of all variants for one GPU, such as "sm90"."""
    tables = _Tables(arch)
    programs = "".join(_program(v, arch, plans_of(v, arch), tables) for v in variants)
    kernels = sorted(tables.kernels.values(), key=lambda item: item[0])
    for _, kernel in kernels:
        if found := kernel.complaints(255):
            raise ValueError(f"{kernel.name} on {arch} {' and '.join(found)}.")
    parts = [
        '/* generated by trm_kernels/export/native.py */\n#include <stddef.h>\n\n#include "plan.h"\n',
        *(f"extern const trm_variant trm_variant_{v.name};\n" for v in variants),
        *(_array("uint64_t", f"cubin_{i}", _words(kernel.cubin)) for i, kernel in kernels),
        _array(
            "trm_kernel",
            "kernels",
            (f'{{"{k.name}", cubin_{i}, {32 * k.num_warps}, {k.shared}}}' for i, k in kernels),
        ),
        _array(
            "trm_term",
            "terms",
            (
                f"{{{t.constant}, {t.times}, {t.block}, {_mask(t.of)}, {_mask(t.blocks_of)}}}"
                for t in tables.terms
            ),
        ),
        _array("trm_argument", "arguments", (line for lines in tables.arguments for line in lines)),
        programs,
    ]
    return "".join(parts)


def source_of_index(variants: Sequence[Variant], archs: Sequence[str]) -> str:
    """C source that lists the variants and, for each GPU, their programs."""
    text = '/* generated by trm_kernels/export/native.py */\n#include "plan.h"\n'
    for v in variants:
        sizes = v.hidden_size, v.num_heads, v.num_key_value_heads, v.intermediate_size, v.num_layers
        counts = v.num_recursion_steps, v.num_cycles, v.evaluations, int(v.causal)
        numbers = ", ".join(map(str, (*sizes, *counts)))
        text += f"extern const trm_variant trm_variant_{v.name};\n"
        text += (
            f'const trm_variant trm_variant_{v.name} = {{"{v.name}", "{v.dtype}", {numbers}, '
            f"{float(v.rope_theta)!r}, {float(v.eps)!r}}};\n"
        )
    programs = [f"trm_{arch}_{v.name}" for arch in archs for v in variants]
    text += "".join(f"extern const trm_program {name};\n" for name in programs)
    text += _array("trm_variant *const", "trm_variants", (f"&trm_variant_{v.name}" for v in variants), "")
    text += f"const int trm_num_variants = {len(variants)};\n"
    text += _array("int", "trm_archs", (arch[2:] for arch in archs), "")
    text += f"const int trm_num_archs = {len(archs)};\n"
    text += _array("trm_program *const", "trm_programs", (f"&{name}" for name in programs), "")
    return text + f"const int trm_num_programs = {len(programs)};\n"


def main(argv: list[str] | None = None) -> int:
    """Write one C file."""
    parser = argparse.ArgumentParser(
        prog="python -m trm_kernels.export.native", description=__doc__.split("\n\n")[0]
    )
    known = sorted(int(arch[2:]) for arch in SHARED_LIMIT)
    parser.add_argument("--variants", type=Path, required=True, help="TOML file of variants")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--arch", type=int, choices=known, metavar="N", help="compile for this GPU")
    what.add_argument(
        "--index", type=int, nargs="+", choices=known, metavar="N", help="list what was compiled"
    )
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(argv)
    try:
        variants = read_variants(chosen.variants)
        if chosen.arch:
            torch.backends.cuda.matmul.allow_tf32 = False
            text = source_of_arch(variants, f"sm{chosen.arch}")
        else:
            text = source_of_index(variants, [f"sm{number}" for number in chosen.index])
    except ValueError as error:
        parser.error(str(error))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
