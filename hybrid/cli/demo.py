"""trm-hybrid demo."""

import argparse


def run(arguments: argparse.Namespace) -> int:
    if arguments.base == "smollm2":
        from hybrid.demo.real.run import run as run_real

        return run_real(output=arguments.output, seed=arguments.seed, quick=arguments.quick)

    from hybrid.demo.run import run as run_demo

    return run_demo(output=arguments.output, seed=arguments.seed, quick=arguments.quick)
