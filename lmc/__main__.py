"""`python -m lmc`: the command `lmc`."""

from lmc.cli import main

raise SystemExit(main())
