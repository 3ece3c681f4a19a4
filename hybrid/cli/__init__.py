"""trm-hybrid: demo | train | generate | eval | info | plan. Parses, calls, prints.

options.py   what each command takes
parser.py    that as argparse has it, and what is wrong with what was typed
block.py     HybridConfig from its options
others       a command each, imported when it is run: only they import torch

What a user can mend (ValueError, OSError) is one line on stderr and exit code 2.
"""

import importlib
import sys
from collections.abc import Sequence

from hybrid.cli.parser import parse
from hybrid.quiet import quiet


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit code: 0, 2 for what a user can mend, 130 when interrupted."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        quiet()
        command = importlib.import_module(f"hybrid.cli.{arguments.module}")
        from hybrid.cli.common import running

        with running(arguments):
            return command.run(arguments)
    except (ValueError, OSError) as error:
        print(f"trm-hybrid: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trm-hybrid: interrupted", file=sys.stderr)
        return 130
