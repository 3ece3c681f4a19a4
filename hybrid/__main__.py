"""`python -m hybrid` and `accelerate launch -m hybrid` are the command trm-hybrid."""

import sys

from hybrid.cli import main

if __name__ == "__main__":
    sys.exit(main())
