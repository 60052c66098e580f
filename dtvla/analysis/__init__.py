"""What was measured: intervals, tables, pictures and the report of a run."""
