"""The command `python -m trm_kernels.aot`: every kernel compiled for chosen GPUs; export/check.py does it."""

from trm_kernels.export.check import main

if __name__ == "__main__":
    raise SystemExit(main())
