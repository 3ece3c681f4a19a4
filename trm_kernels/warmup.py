"""The command `python -m trm_kernels.warmup`: Triton's cache filled ahead; export/warmup.py does it."""

from trm_kernels.export.warmup import main

if __name__ == "__main__":
    raise SystemExit(main())
