"""What every floor stands on: values without I/O, the error tree, counters."""
