"""Runs: from settings to a folder that can be trusted."""

import os

# GNU OpenMP spins for milliseconds at each barrier before it sleeps. On a machine whose cores are
# busy elsewhere that turns a step of 0.3 s into 3 s or more (docs/log.md); a short spin costs a
# quiet machine nothing. It is read when torch is loaded, and what the user set stands.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
