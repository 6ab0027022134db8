"""Everything that a run writes for its reader: tables, pictures, report.html, comparisons, TensorBoard curves."""
