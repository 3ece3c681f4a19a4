"""`python -m evidence_real`, with examples/ on the path."""

from evidence_real.command import main

raise SystemExit(main())
