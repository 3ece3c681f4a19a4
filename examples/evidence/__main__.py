"""`PYTHONPATH=examples python -m evidence`, which `make evidence` is."""

from evidence.command import main

if __name__ == "__main__":  # the processes that it starts import this file again
    raise SystemExit(main())
