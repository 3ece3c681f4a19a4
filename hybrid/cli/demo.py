"""trm-hybrid demo."""

import argparse


def run(arguments: argparse.Namespace) -> int:
    from hybrid.demo.run import run as run_demo

    return run_demo(output=arguments.output, seed=arguments.seed, quick=arguments.quick)
