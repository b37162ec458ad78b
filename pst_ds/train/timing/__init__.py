"""Where the time of a run goes: parts of its steps, ranks that the others wait for, steps that are recorded."""
