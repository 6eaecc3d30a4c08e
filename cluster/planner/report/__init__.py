"""The report of a plan: one HTML page made of what `mull plan --json` prints, that needs no network and no script."""
