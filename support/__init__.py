"""How a script runs: flags, bad input, run folder, records, progress; statistics."""
