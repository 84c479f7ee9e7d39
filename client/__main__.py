"""The entry of ``python -m client``."""

from __future__ import annotations

import sys

from client.command_line import main

sys.exit(main())
